"""Hidden vectors in float8, for outputs that are products of two numbers of e4m3: one scale a sample, rounded to the nearest.

In units of its sample's scale a number keeps three bits after the point from 2**-6 to 448; below, it goes in steps of 2**-9. The
largest of a sample lies above 224, up to 448. A scale is a power of two: values times scale are exact in bfloat16, so that
outputs are the same sums of the same products whether float8 is multiplied or what it is widened to.

The gradient passes straight through the rounding: to hidden vectors by the weights, to weights by what was not rounded.
Sources: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); Rouhani et al. 2023, arXiv:2310.10537 (scales that are powers of two);
         Bengio et al. 2013, arXiv:1308.3432 (straight through); "ELMO", ICML 2025, arXiv:2510.11168 (outputs of many labels so).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mach.heads.rounding import FLOAT8, FLOAT8_SCALE, widen

LEAST = -100  # exponent of a scale: what it scales stays a normal number of bfloat16 and float32


@dataclass(frozen=True, slots=True)
class Scaled:
    """Numbers as float8 times a power of two a sample."""

    values: Tensor  # e4m3 (R, N, D)
    scales: Tensor  # (R, N), float32, or float64 for numbers of that type

    def widened(self, dtype: torch.dtype) -> Tensor:
        """Give the numbers themselves (R, N, D) in a wider type, exact."""
        out = widen(self.values, torch.empty(self.values.shape, dtype=dtype, device=self.values.device))
        return out.mul_((self.scales * FLOAT8_SCALE).to(dtype).unsqueeze(2))  # `widen` takes them for stored weights


def scaled(hidden_RND: Tensor) -> Scaled:
    """Round hidden vectors to the nearest of float8, ties to even; the scale of a sample that is not finite becomes NaN."""
    most = hidden_RND.abs().amax(2)
    most = most if most.dtype == torch.float64 else most.float()
    shares, exponents = torch.frexp(most)  # 448 is 7/8 of 2**9
    exponents = (exponents - 9 + (shares > 7 / 8)).clamp_(LEAST, 127)
    scales = (exponents + 127 << 23).view(torch.float32).to(most.dtype)  # by its bits: some devices' powers are not exact
    return Scaled((hidden_RND / scales.to(hidden_RND.dtype).unsqueeze(2)).to(FLOAT8), scales + 0 * most)
