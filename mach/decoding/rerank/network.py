"""Small networks that weigh what is known of a candidate label: opinions in, a log-odds out, the mean of several networks.

A network is x -> skip . x + out . relu(W2 relu(W1 x + b1) + b2) + c: linear, as long as nothing better is learnt. How much a
margin counts depends on how frequent a label is and how sure the ensemble is, and too great a likeness may speak against a
label: no sum can say that. They are trained on samples that neither stage has seen, each network without a part of them, on
which it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mach.data.csr import read_only
from mach.kernels import jit_ieee, over_rows

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

MEMBERS = 8  # networks, and parts that the samples are cut into
WIDTH = 32
EPOCHS, VISITS, BATCH, RATE, DECAY = 20, 60_000, 64, 2e-2, 0.1  # VISITS: of samples, which makes epochs of many fewer
ROWS_A_TASK = 4096  # candidates that a thread weighs before it takes more
NAMES = ("first", "first_bias", "second", "second_bias", "out", "skip", "bias")


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """M networks over D opinions, H hidden units in each of two layers; all float32.

    The shapes: first (M, D, H), first_bias (M, H), second (M, H, H), second_bias (M, H), out (M, H), skip (M, D), bias (M,).
    """

    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats
    out: Floats
    skip: Floats
    bias: Floats

    @property
    def n_parameters(self) -> int:
        """Give the number of weights and biases."""
        return sum(getattr(self, name).size for name in NAMES)

    def scores(self, opinions_NkD: Floats) -> Floats:
        """Give the log-odds of each candidate, float32 (N, k): the same bits whatever the other candidates."""
        x_CD = np.ascontiguousarray(opinions_NkD.reshape(-1, opinions_NkD.shape[2]))
        scores_C = np.empty(len(x_CD), np.float32)
        fixed = [read_only(x_CD), *(read_only(getattr(self, name)) for name in NAMES)]
        over_rows(_score, (*fixed, scores_C), len(x_CD), a_task=ROWS_A_TASK)
        return scores_C.reshape(opinions_NkD.shape[:2])


def sum_of(weights_D: npt.ArrayLike) -> Network:
    """Give the network without hidden units that weighs each opinion by a number."""
    skip, D = np.array([weights_D], np.float32), np.shape(weights_D)[0]
    shapes = (1, D, 0), (1, 0), (1, 0, 0), (1, 0), (1, 0)
    first, first_bias, second, second_bias, out = (np.empty(shape, np.float32) for shape in shapes)
    return Network(first, first_bias, second, second_bias, out, skip, np.zeros(1, np.float32))


def fit_network(opinions_NkD: Floats, is_candidate_Nk: Bools, right_Nk: Bools) -> tuple[Network, Floats]:
    """Train the networks on N samples of k candidates; give them, and each sample's scores by the one that has not seen it.

    The loss of a sample is the cross entropy of each candidate, summed, which makes log-odds of the scores, and that of the
    softmax over its candidates, which puts a right one first. The same answer each time for a number of torch's threads.

    Args: is_candidate, False where a place is empty: its opinions do not count, and its score means nothing.
    """
    random = torch.Generator().manual_seed(0)
    X, Y, V = (torch.from_numpy(np.ascontiguousarray(each)) for each in (opinions_NkD, right_Nk, is_candidate_Nk))
    mean_D, scale_D = X[V].mean(0), X[V].std(0)
    scale_D[scale_D < 1e-6] = torch.inf  # of what is always the same nothing is learnt: it does not count
    X, Y = (X - mean_D) / scale_D, Y.float()
    N, k, D = X.shape
    part_N = torch.arange(N) % MEMBERS
    others = [torch.nonzero(part_N != m).flatten() for m in range(MEMBERS)]
    seen_Mn = torch.stack([rows[: min(map(len, others))] for rows in others])
    P = _first_parameters(D, random)
    optimizer = torch.optim.AdamW(P, lr=RATE, weight_decay=DECAY)
    n_epochs = min(EPOCHS, -(-VISITS // N))
    n_steps = n_epochs * -(-seen_Mn.shape[1] // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=n_steps)
    for _ in range(n_epochs):
        order_Mn = torch.stack([rows[torch.randperm(len(rows), generator=random)] for rows in seen_Mn])
        for rows_Mb in torch.split(order_Mn, BATCH, 1):
            z = _outputs(X[rows_Mb].flatten(1, 2), P).view(*rows_Mb.shape, k)
            optimizer.zero_grad()
            (_loss(z, Y[rows_Mb], V[rows_Mb]) / rows_Mb.shape[1]).backward()  # type: ignore[no-untyped-call]  # torch has none
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        unseen_Nk = torch.empty(N, k)
        for m in range(MEMBERS):
            of_one = [each[m : m + 1] for each in P]
            unseen_Nk[part_N == m] = _outputs(X[part_N == m].view(1, -1, D), of_one).view(-1, k)
        return _plain([each.detach() for each in P], mean_D, scale_D), unseen_Nk.numpy()


def _first_parameters(D: int, random: torch.Generator) -> list[Tensor]:
    """Give the parameters in the order of NAMES: near to a linear network, which is zero."""

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).requires_grad_()

    M, H = MEMBERS, WIDTH
    zeros = [torch.zeros(shape, requires_grad=True) for shape in ((M, H), (M, H), (M, D), (M,))]
    first, second, out = (
        normal(M, D, H, scale=D**-0.5),
        normal(M, H, H, scale=(2 / H) ** 0.5),
        normal(M, H, scale=0.1 * H**-0.5),
    )
    return [first, zeros[0], second, zeros[1], out, zeros[2], zeros[3]]


def _outputs(x_MCD: Tensor, P: list[Tensor]) -> Tensor:
    """Give the outputs of M networks, each of its own candidates: (M, C)."""
    first, first_bias, second, second_bias, out, skip, bias = P
    hidden = torch.relu(torch.baddbmm(first_bias.unsqueeze(1), x_MCD, first))
    hidden = torch.relu(torch.baddbmm(second_bias.unsqueeze(1), hidden, second))
    both = torch.bmm(hidden, out.unsqueeze(2)) + torch.bmm(x_MCD, skip.unsqueeze(2))
    return both.squeeze(2) + bias.unsqueeze(1)


def _loss(z_MNk: Tensor, right_MNk: Tensor, is_candidate_MNk: Tensor) -> Tensor:
    """Give the loss of all samples, summed: see `fit_network`."""
    each = F.binary_cross_entropy_with_logits(z_MNk, right_MNk, reduction="none")
    log_shares = torch.log_softmax(z_MNk.masked_fill(~is_candidate_MNk, -30.0), 2)
    first = (log_shares * right_MNk).sum(2) / right_MNk.sum(2).clamp(min=1)
    return (each * is_candidate_MNk).sum() - first.sum()


def _plain(P: list[Tensor], mean_D: Tensor, scale_D: Tensor) -> Network:
    """Give the networks over opinions as they come instead of over scaled ones."""
    first, first_bias, second, second_bias, out, skip, bias = (each.double() for each in P)
    first, skip = first / scale_D[:, None], skip / scale_D
    first_bias, bias = first_bias - mean_D.double() @ first, bias - skip @ mean_D.double()
    arrays = (first, first_bias, second, second_bias, out, skip, bias)
    return Network(*(each.float().contiguous().numpy() for each in arrays))


@jit_ieee
def _score(
    x_CD: Array, first: Array, first_bias: Array, second: Array, second_bias: Array, out: Array, skip: Array, bias: Array,
    scores_C: Array, low: int, high: int,
) -> None:  # fmt: skip
    M, D, H = first.shape
    one, two = np.empty(H, np.float32), np.empty(H, np.float32)
    for c in range(low, high):
        total = np.float32(0)
        for m in range(M):
            one[:] = first_bias[m]
            for d in range(D):
                x, row = x_CD[c, d], first[m, d]
                for h in range(H):
                    one[h] += x * row[h]
            two[:] = second_bias[m]
            for g in range(H):
                x, row = one[g], second[m, g]
                if x > 0:
                    for h in range(H):
                        two[h] += x * row[h]
            score = bias[m]
            for d in range(D):
                score += skip[m, d] * x_CD[c, d]
            for h in range(H):
                score += out[m, h] * max(two[h], np.float32(0))
            total += score
        scores_C[c] = total / np.float32(M)
