"""Dropout of packed repetitions, each with its own generator: what a repetition becomes does not depend on its companions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Dropout:
    """The masks of one step, drawn in turn, one for each layer.

    An entry takes one random byte: the share kept is a multiple of 1/256, and drawing costs a tenth of a float each.
    Source: Srivastava et al. 2014, JMLR 15 (kept entries are scaled while training).
    """

    def __init__(self, share: float, generators: Sequence[torch.Generator]):
        self.generators = generators
        self.kept = round(256 * (1 - share)) or 1  # of 256
        self.scale = 256 / self.kept

    def bytes(self, n_samples: int, width: int) -> Tensor:
        """Draw one byte an entry, uint8 (R, N, D); an entry is kept where it is below `kept`."""
        R, n = len(self.generators), n_samples * width
        words = torch.empty(R, -(-n // 8), dtype=torch.int64, device=self.generators[0].device)
        for part, generator in zip(words, self.generators, strict=True):
            part.random_(-(2**63), None, generator=generator)
        return words.view(torch.uint8)[:, :n].reshape(R, n_samples, width)

    def __call__(self, hidden_RND: Tensor) -> Tensor:
        """Drop entries of (R, N, D) and scale the others."""
        _, N, D = hidden_RND.shape
        return hidden_RND * (self.bytes(N, D) <= self.kept - 1) * self.scale  # a byte holds no 256
