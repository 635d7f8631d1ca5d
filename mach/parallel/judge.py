"""Samples that neither stage has learnt from choose between second stages, and train the networks of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import TopK
from mach.decoding.rerank import (
    N_OPINIONS,
    Evidence,
    Network,
    SparseWeights,
    best_of,
    fit_network,
    hear,
    look_around,
    ndcg,
    sum_of,
)
from mach.decoding.rerank.neighbours import Found
from mach.errors import ConfigError
from mach.metrics import hits
from mach.parallel.devices import devices_of
from mach.store import Run

SAMPLES = 6_000  # of which a choice has enough
NETWORKS_FROM = 200  # samples, below which networks are no better than sums: see experiments/accuracy/networks
WEIGHTS = (0.4, 0.75, 1.5, 3.0, 6.0, 12.0, 24.0)  # of a margin beside a mean logit
SHARES = (0.0, 0.5, 1.0, 2.0, 4.0)  # of a likeness beside a margin

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


class Heard(NamedTuple):
    """What training samples say, and around N other samples: their neighbours, and labels near to them, (N, n)."""

    evidence: Evidence
    found: Found
    near: Ints


class Choice(NamedTuple):
    """How labels are best ordered."""

    which: int  # of the weights tried
    weight: float  # of a margin beside a mean logit, if there is no network
    network: Network | None

    @property
    def order(self) -> str:
        """Say what labels are ordered by."""
        if self.network is None:
            return f"logit + {self.weight:g} margin"
        if self.network.first.size:
            return "networks"
        return " + ".join(
            ["logit", *(f"{x:g} {name}" for x, name in zip(self.network.skip[0, 1:3], ("margin", "likeness"), strict=True))]
        )


@dataclass(frozen=True, slots=True)
class Judge:
    """N samples, and what decoding finds for them: twice as many labels as are to be ordered, or all."""

    name: str  # what they are
    features: CSR
    truth: CSR
    top: TopK  # by mean logits
    depth: int

    @classmethod
    def of(cls, run: Run, dataset: Dataset, held: Ints, depth: int, device: str) -> Judge | None:
        """Take the dev split or what was held out, at most SAMPLES of it, evenly; None if there is nothing."""
        name = "dev" if "dev" in dataset.split_names and dataset.split("dev").n_samples else "held out"
        split = dataset.split("dev" if name == "dev" else "train")
        rows = np.arange(split.n_samples) if name == "dev" else held
        if not len(rows):
            return None
        rows = rows[:: -(-len(rows) // SAMPLES)]
        features, model = take(split.features, rows), run.load(device=devices_of(device)[0], rerank=False)
        if not isinstance(features, CSR):
            raise ConfigError("rerank needs sparse features")
        top = model.predict_topk(features, min(2 * depth, run.sizes.n_labels))
        top = TopK(top.labels, top.scores / np.float32(len(model.repetitions)))
        return cls(name, features, take_rows(split.labels, rows), top, depth)

    def hear(self, evidence: Evidence) -> Heard:
        """Give what is found around each sample: as many labels as decoding gives it, (N, depth), -1 where there are no more.

        Or (N, 0), if the next labels of decoding have no fewer right ones among them.
        """
        first, more = self.top.labels[:, : self.depth], self.top.labels[:, self.depth :]
        found, near = look_around(self.features, first, evidence, self.depth)
        is_better = self._right(near).sum() > self._right(more).sum()
        return Heard(evidence, found, near if is_better else near[:, :0])

    def best(self, fits: Sequence[SparseWeights], weight: float, heard: Heard | None) -> Choice:
        """Choose which of the weights orders best, and how margins and what training samples say count beside a mean logit.

        The first way that is tried is taken unless another is clearly better: see `tried` and `best_of`.
        """
        tried = self.tried(fits, weight, heard)
        return tried[best_of([gained_N for _, gained_N in tried])][0]

    def tried(self, fits: Sequence[SparseWeights], weight: float, heard: Heard | None) -> list[tuple[Choice, Floats]]:
        """Give ways to order labels, and what each sample gains by them, its nDCG@5.

        Networks come first, over the margins of each of the weights, the best in front, if there are samples enough to train
        them; they are judged on samples that they have not seen. Then the sum that is asked for, and others.

        Args: weight, of margins in that sum; heard, as `hear` gives it, None if no other sum is wanted, and no networks.
        """
        labels, logits = self.top.labels[:, : self.depth], self.top.scores[:, : self.depth]
        n_true_N, right = np.diff(self.truth.indptr), self._right(labels)
        found = [
            (Choice(i, weight, None), ndcg(logits + weight * each.margins(self.features, labels), right, n_true_N))
            for i, each in enumerate(fits)
        ]
        if heard is None:
            return found
        right = np.concatenate([right, self._right(heard.near)], 1)
        told = [hear(self.features, labels, logits, heard.found, heard.near, each, heard.evidence) for each in fits]
        is_candidate = told[0][1]  # the same whatever the margins

        def gained(scores: npt.NDArray[np.float32]) -> Floats:
            return ndcg(np.where(is_candidate, scores, -np.inf), right, n_true_N)

        for (i, (opinions, _)), margin, share in itertools.product(enumerate(told), WEIGHTS, SHARES):
            network = sum_of((1, margin, margin * share, *[0] * (N_OPINIONS - 3)))
            choice = Choice(i, margin, network if share or heard.near.shape[1] else None)
            found.append((choice, gained(network.scores(opinions))))
        if len(n_true_N) >= NETWORKS_FROM:
            networks = [(i, *fit_network(opinions, is_candidate, right)) for i, (opinions, _) in enumerate(told)]
            judged = [(Choice(i, 0.0, network), gained(unseen)) for i, network, unseen in networks]
            found = sorted(judged, key=lambda each: -float(each[1].mean())) + found
        return found

    def _right(self, labels: Ints) -> Bools:
        """Tell which labels are true of their samples; -1 is the end of a list."""
        right: Bools = hits(np.ascontiguousarray(labels), self.truth).astype(np.bool_)
        return right
