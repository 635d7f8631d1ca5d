"""How many bytes a rank sends in a step of a sharded full head: a formula, so that a network can be judged before training.

Axes: N samples of the batch, D hidden width, V width of the head's input, P ranks.
"""

from __future__ import annotations

from mach.comm import lengths_of
from mach.config import AUTO, Config


def gathered_bytes(lengths: list[int], row_bytes: int) -> int:
    """Give what a rank sends so that all have every rank's rows: P - 1 times the rows of the longest part."""
    return (len(lengths) - 1) * max(lengths) * row_bytes


def scattered_bytes(lengths: list[int], rank: int, row_bytes: int) -> int:
    """Give what a rank sends so that each has its rows of the sum: all rows but its own, once."""
    return (sum(lengths) - lengths[rank]) * row_bytes


def reduced_bytes(n: int, size: int, item_bytes: int) -> int:
    """Give what a rank sends so that all have the sum of n numbers, round a ring: each P-th of them twice, but P - 1 times."""
    return 2 * (size - 1) * -(-n // size) * item_bytes


def step_bytes(
    config: Config, hidden: int, n_samples: int, rank: int, size: int, *, want_loss: bool, product_bytes: int = 4,
    sum_bytes: int = 4,
) -> dict[str, int]:  # fmt: skip
    """Give the bytes that a rank sends in one step of N samples, by what they hold; K does not come into it.

    Args: hidden, D; product_bytes, of a number of the products (2 for bfloat16); sum_bytes, of one of a sum.
    """
    lengths, D = lengths_of(n_samples, size), hidden
    narrow = 0 if config.bottleneck == AUTO else int(config.bottleneck)  # auto is none before a full head
    V = narrow or D
    dense = D + config.layers * (D * D + D) + D * narrow + want_loss
    return {
        "hidden vectors": gathered_bytes(lengths, V * product_bytes),
        "log-sum-exp": gathered_bytes([1] * size, n_samples * sum_bytes) if config.loss == "softmax" else 0,
        "their gradient": scattered_bytes(lengths, rank, V * sum_bytes),
        "gradient of z": gathered_bytes(lengths, D * product_bytes),
        "dense gradients": reduced_bytes(dense, size, sum_bytes),
    }
