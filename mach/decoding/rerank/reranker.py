"""The second stage: what is known of a sample's best labels, and of those near to it, orders them anew.

A hashed score knows a label by its buckets only, which it shares with others. A margin of the label's own, learnt against the
labels that decoding confuses it with, tells them apart, and so does how much a sample is like the label's others, and which
labels the training samples most like it have. These err differently: a small network weighs them, or, where there were no
samples to train it on, a sum of logit and margin does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from mach.data import CSR
from mach.decoding.only import Only
from mach.decoding.rerank.linear import SparseWeights
from mach.decoding.rerank.neighbours import Found, Neighbours
from mach.decoding.rerank.network import NAMES, Network
from mach.decoding.topk import TopK

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DEFAULT_WEIGHT = 1.5  # of a margin beside a mean logit: see experiments/accuracy
N_TOLD = 5  # numbers of a candidate that are told as they are, and less the sample's best
N_OPINIONS = 2 * N_TOLD + 1


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What training samples say of labels: K prototypes, how many samples each label has, (K,), and the samples themselves.

    Neighbours are None where they are not heard: zeros stand for what they say.
    """

    prototypes: SparseWeights
    counts: npt.NDArray[np.int32]
    neighbours: Neighbours | None


@dataclass(frozen=True, slots=True, eq=False)
class Opinions:
    """What weighs logits, margins, and what training samples say.

    `n_near` labels that neighbours vote for are candidates beside those of the ensemble.
    """

    evidence: Evidence
    network: Network
    n_near: int

    @property
    def n_parameters(self) -> int:
        """Give the number of values of all parts, those of the kept samples among them."""
        known = self.evidence
        kept = 0 if known.neighbours is None else len(known.neighbours.samples.values)
        return len(known.prototypes.values) + len(known.counts) + kept + self.network.n_parameters


@dataclass(frozen=True, eq=False)
class Reranker:
    """Weights of K labels that order the `depth` best labels of a sample anew.

    By `weight` times a label's margin beside its mean logit; or by a network, over these labels and those it finds itself.
    """

    weights: SparseWeights
    depth: int
    weight: float
    opinions: Opinions | None = None

    @property
    def n_parameters(self) -> int:
        """Give the number of weights and biases of all parts."""
        return self.weights.n_parameters + (0 if self.opinions is None else self.opinions.n_parameters)

    @functools.cached_property
    def key(self) -> str:
        """Give 32 hexadecimal digits that identify the weights and how they are used."""
        more, w = self.opinions, self.weights
        numbers = (w.n_features, self.depth, self.weight, None if more is None else more.n_near)
        state, arrays = xxhash.xxh3_128(repr(numbers).encode()), [w.indptr, w.features, w.values, w.bias]
        if more is not None:
            known = more.evidence
            arrays += [known.prototypes.indptr, known.prototypes.features, known.prototypes.values, known.counts]
            if (kept := known.neighbours) is not None:
                arrays += [kept.samples.indptr, kept.samples.features, kept.samples.values]
                arrays += [kept.labels.indptr, kept.labels.indices]
            arrays += [getattr(more.network, name) for name in NAMES]
        for array in arrays:
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def rerank(self, features: CSR, top: TopK, k: int, n_repetitions: int, only: Only | None = None) -> TopK:
        """Order the first `depth` labels of each sample anew, those that neighbours vote for among them, and keep k.

        Args:    top, labels by falling sums of the logits of `n_repetitions` repetitions; at least k of them.
                 only, which labels may be found, where not all.
        Returns: scores are n_repetitions times log-odds by the network, or sums of logits plus n_repetitions weight margin; the
                 other labels keep their order and their distances, moved down together so far that they stay below. Ties go
                 to the smaller label id.
        """
        depth = min(self.depth, top.labels.shape[1])
        labels, logits = top.labels[:, :depth], top.scores[:, :depth].astype(np.float32)
        if self.opinions is None:
            scores = logits + np.float32(n_repetitions * self.weight) * self.weights.margins(features, labels)
        else:
            found, near = look_around(features, labels, self.opinions.evidence, self.opinions.n_near, only)
            known = (found, near, self.weights, self.opinions.evidence)
            opinions, is_candidate = hear(features, labels, logits / np.float32(n_repetitions), *known)
            labels = np.concatenate([labels, near], 1)
            scores = np.float32(n_repetitions) * self.opinions.network.scores(opinions)
            scores[~is_candidate] = -np.inf
        order = np.lexsort((labels, -scores), axis=1)
        labels, scores = (np.take_along_axis(each, order, 1) for each in (labels, scores))
        labels, scores = _followed(labels, scores, top, depth, k)
        return TopK(np.ascontiguousarray(labels[:, :k]), np.ascontiguousarray(scores[:, :k]))


def look_around(features: CSR, labels: Ints, evidence: Evidence, n_near: int, only: Only | None = None) -> tuple[Found, Ints]:
    """Give the neighbours of each sample, and n labels that they vote for and that are not among its own: (N, n), -1 is none."""
    if evidence.neighbours is None:
        return Found(np.empty((len(labels), 0), np.int64), np.empty((len(labels), 0), np.float32)), labels[:, :0]
    found = evidence.neighbours.find(features)
    return found, evidence.neighbours.near(found, n_near, labels, only)


def hear(
    features: CSR, labels: Ints, logits: Floats, found: Found, near: Ints, weights: SparseWeights, evidence: Evidence
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Give what a network hears of each candidate, (N, k, 11), and which places hold one, (N, k); zeros where there is none.

    Mean logit, margin, cosine to the prototype, largest cosine to a neighbour that has the label, share of the neighbours'
    votes; each also less the sample's best; and log(1 + samples of the label).

    Args: labels (N, n), the ensemble's best, and their mean logits; found, each sample's neighbours; near (N, k - n), -1 where
          there is none. Their logits are at most the last of those, which stands for them.
    """
    every = np.concatenate([labels, near], 1)
    is_candidate, known = every >= 0, np.maximum(every, 0)
    told = np.zeros((*every.shape, N_OPINIONS), np.float32)
    told[:, :, 0] = np.concatenate([logits, np.broadcast_to(logits[:, -1:], near.shape)], 1)
    told[:, :, 1] = weights.margins(features, known)
    told[:, :, 2] = evidence.prototypes.margins(features, known)
    if evidence.neighbours is not None:
        told[:, :, 3:N_TOLD] = evidence.neighbours.votes(found, every)
    if every.shape[1]:
        best = np.where(is_candidate[:, :, None], told[:, :, :N_TOLD], -np.inf).max(1, keepdims=True)
        told[:, :, N_TOLD : 2 * N_TOLD] = told[:, :, :N_TOLD] - best
    told[:, :, 2 * N_TOLD] = np.log1p(evidence.counts[known].astype(np.float32))
    told[~is_candidate] = 0
    return told, is_candidate


def _followed(labels: Ints, scores: Floats, top: TopK, depth: int, k: int) -> tuple[Ints, Floats]:
    """Let what is decoded beyond `depth` follow candidates that are in order, without what is among these; for k labels."""
    if labels.shape[1] >= k and np.isfinite(scores[:, :k]).all():
        return labels, scores
    rest, rest_scores = top.labels[:, depth:], top.scores[:, depth:].astype(np.float32)
    n_found = np.isfinite(scores).sum(1, keepdims=True)
    last = np.take_along_axis(scores, n_found - 1, 1)
    down = np.maximum(rest_scores[:, :1] - last, 0)
    rest_scores = np.minimum(rest_scores - down, last)  # rounding may not lift one
    again = (rest[:, :, None] == labels[:, None, :]).any(2) if labels.shape[1] > depth else np.zeros(rest.shape, np.bool_)
    gone = np.concatenate([~np.isfinite(scores), again], 1)
    order = np.argsort(gone, axis=1, kind="stable")
    both = np.concatenate([labels, rest], 1), np.concatenate([scores, rest_scores], 1)
    return np.take_along_axis(both[0], order, 1), np.take_along_axis(both[1], order, 1)
