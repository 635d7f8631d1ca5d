"""AdamW on the CPU in one pass: moments, weights and, where products run in bfloat16, the weights' copy for them.

torch's fused kernel wants the gradient in the weights' type and leaves the copy to a pass of its own; the update of a head is
bound by memory, so each pass counts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mach.kernels import array_of, in_threads, jit_ieee, read, write

LEAST = 1 << 16  # weights of one task; below, handing out tasks costs more than it saves


def adamw_(
    weight_RX: Tensor, first_RX: Tensor, second_RX: Tensor, gradient_RX: Tensor, low_RX: Tensor | None,
    *, step: int, rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update weights and moments in place; axes after R lie in a row in memory, and R may have gaps between.

    Args:   gradient, of the weights' type or bfloat16; low, a bfloat16 copy of the weights to be renewed (rounded to nearest);
            step, from 1. The same bits for any number of threads.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, with the decay times the rate, as torch has it.
    """
    dtype = torch.zeros((), dtype=weight_RX.dtype).numpy().dtype.type
    root = (1 - betas[1] ** step) ** 0.5
    numbers = [dtype(x) for x in (1 - betas[0], 1 - betas[1], rate * root / (1 - betas[0] ** step), root * epsilon)]
    numbers.append(dtype(1 - rate * weight_decay))
    tasks = []
    for r in range(len(weight_RX)):
        tensors = [weight_RX[r], first_RX[r], second_RX[r], gradient_RX[r]] + ([] if low_RX is None else [low_RX[r]])
        flat = [array_of(x.view(-1)) for x in tensors]
        if low_RX is None:
            flat.append(np.empty(0, np.uint16))
        cuts = range(0, len(flat[0]), max(LEAST, -(-len(flat[0]) // torch.get_num_threads())))
        tasks += [(*(x[a : a + cuts.step] for x in flat), *numbers) for a in cuts]
    in_threads(_adamw, tasks, torch.get_num_threads())


@jit_ieee
def _adamw(
    weight: np.ndarray, first: np.ndarray, second: np.ndarray, gradient: np.ndarray, low: np.ndarray,
    share_1: float, share_2: float, rate: float, epsilon: float, keep: float,
) -> None:  # fmt: skip
    n_low = len(low)
    for i in range(len(weight)):
        g = read(gradient[i])
        moment = first[i] + share_1 * (g - first[i])
        square = second[i] + share_2 * (g * g - second[i])
        first[i], second[i] = moment, square
        new = keep * weight[i] - rate * moment / (np.sqrt(square) + epsilon)
        weight[i] = new
        if n_low:
            write(low, i, new)
