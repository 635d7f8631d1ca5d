# mypy: ignore-errors
"""The head's step in Triton, second half: weights change by a rule and are rounded to their storage, read and written once.

of batches that fit a block of samples: outputs and the weights' gradient live in registers

    row_moments          row-wise optimisers only: mean square of a row's gradient, its moment, its step size
    update_weights       a block of weights: gradient g h, rule, rounding; and its part of the hidden gradient, g^T W

of larger batches, whose products torch takes

    apply_rule           a block of weights: rule and rounding, from their gradient

Axes and sums as in `triton_kernels`.
"""

import triton
import triton.language as tl

from mach.gpu.triton_rounding import GOLDEN, bfloat16_of, float8_of, mixed, nearest_of
from mach.heads.fused.triton_kernels import BFLOAT16, CHANGING, FLOAT8, PLAIN, product_of, weights_of

DENSE_STEP, MOMENTS, ROWS = (tl.constexpr(i) for i in range(3))  # sgd; adamw; row-wise
OTHER = tl.constexpr(0x85EBCA6B)


@triton.jit
def noise_of(key, numbers, r, rows_C, columns_D):
    """Give the random bits of a block of weights, uint32 (C, D), from the key of seed and step and the repetition's number."""
    key_r = mixed(key.to(tl.uint32) + tl.load(numbers + r).to(tl.uint32) * OTHER)
    row_keys = mixed(rows_C.to(tl.uint32) * GOLDEN ^ key_r)
    return row_keys[:, None] + (columns_D.to(tl.uint32) * GOLDEN)[None, :]


@triton.jit
def step_sizes(moments, places_C, exists_C, squares_C, width, rate, keep_moment, share, correction, epsilon):
    """Renew the moments of rows from the sums of their gradients' squares; give the rows' step sizes (C).

    moment <- keep moment + share mean_d g^2; step = rate / (sqrt(moment correction) + epsilon).
    """
    moment = tl.load(moments + places_C, mask=exists_C, other=0.0)
    moment = keep_moment * moment + share * squares_C / width
    tl.debug_barrier()  # threads that share a row have all read it
    tl.store(moments + places_C, moment, mask=exists_C)
    return rate / (tl.sqrt(moment * correction) + epsilon)


@triton.jit(do_not_specialize=CHANGING)
def row_moments(
    gradients, hidden, moments, steps, first_tile, n_outputs, width, padded, wide, n_held,
    scale, rate, keep_moment, share, correction, epsilon, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Bring the moments (R, B) of a tile's rows up to date and write their step sizes (R, held). Program (tile, repetition).

    `scale` makes sums gradients.
    """
    tile, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lanes, samples = tl.arange(0, C), tl.arange(0, N)
    held = r * n_held + tile * C + lanes
    g = tl.load(gradients + held[:, None] * padded + samples[None, :])
    squares = tl.zeros((C,), tl.float32)
    for d in range(0, wide, D):
        h = tl.load(hidden + (r * padded + samples)[:, None] * wide + (d + tl.arange(0, D))[None, :])
        total = product_of(g, h, tl.zeros((C, D), tl.float32)) * scale
        squares += tl.sum(total * total, 1)
    rows = (first_tile + tile) * C + lanes
    size = step_sizes(
        moments, r * n_outputs + rows, rows < n_outputs, squares, width, rate, keep_moment, share, correction, epsilon
    )
    tl.store(steps + held, size)


@triton.jit
def renew(
    weight, low, stored, gradient, step_C, first, second, lost, slots, numbers, r, rows_C, columns_D, places, mask,
    n_outputs, width, n_slots, key, first_row, rate, keep, share_1, share_2, epsilon,
    RULE: tl.constexpr, STORAGE: tl.constexpr, COMPENSATED: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Change a block of weights, whose stored numbers were read, by its gradient (C, D) and a rule, round and store it.

        DENSE_STEP  w <- keep w - rate g
        MOMENTS     m <- m + share_1 (g - m);  v <- v + share_2 (g g - v);  w <- keep w - rate m / (sqrt(v) + epsilon)
        ROWS        w <- keep w - step[row] g

    rounded stochastically to the storage. COMPENSATED: a row of slot s >= 0 is w + lost[s], rounded to the nearest; lost[s] keeps
    the rest. COPIES: `low` takes the same numbers, rounded to the nearest of its type.
    """
    w = stored.to(tl.float32)
    if STORAGE == FLOAT8:
        w *= 0.03125
    if COMPENSATED:
        slot = tl.load(slots + r * n_outputs + tl.minimum(rows_C, n_outputs - 1))
        is_kept = (slot >= 0)[:, None]
        rests = lost + (r * n_slots + slot).to(tl.int64)[:, None] * width + columns_D[None, :]
        w += tl.load(rests, mask=mask & is_kept, other=0.0).to(tl.float32)
    if RULE == MOMENTS:
        m, v = tl.load(first + places, mask=mask, other=0.0), tl.load(second + places, mask=mask, other=0.0)
        m += share_1 * (gradient - m)
        v += share_2 * (gradient * gradient - v)
        tl.store(first + places, m, mask=mask)
        tl.store(second + places, v, mask=mask)
        change = rate * m / (tl.sqrt(v) + epsilon)
    elif RULE == ROWS:
        change = step_C[:, None] * gradient
    else:
        change = rate * gradient
    w = keep * w - change
    if STORAGE == PLAIN:
        new = w
    else:
        u = noise_of(key, numbers, r, rows_C + first_row, columns_D)
        new = bfloat16_of(w, u) if STORAGE == BFLOAT16 else float8_of(w, u)
    if COMPENSATED:
        nearest = nearest_of(w, tl.bfloat16)
        tl.store(rests, nearest_of(w - nearest.to(tl.float32), tl.bfloat16), mask=mask & is_kept)
        new = tl.where(is_kept, nearest, new)
    tl.store(weight + places, new, mask=mask)
    if COPIES:
        tl.store(low + places, nearest_of(w, low.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=CHANGING)
def update_weights(
    gradients, hidden, weight, bias_gradient, parts, steps, first, second, lost, slots, numbers,
    first_tile, n_outputs, width, padded, wide, n_chunk_tiles, n_held, n_width_blocks, n_slots,
    key, first_row, scale, rate, keep, share_1, share_2, epsilon,
    RULE: tl.constexpr, STORAGE: tl.constexpr, COMPENSATED: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Update every S-th tile of a chunk in one block of hidden units. Program (stripe S and block, repetition).

    The gradient of a weight is `scale` times the sum over samples. Old weights, while they are here, give their part of the
    hidden gradient: parts (S, R, wide, padded).
    """
    width_block, stripe = tl.program_id(0) % n_width_blocks, tl.program_id(0) // n_width_blocks
    n_stripes = tl.num_programs(0) // n_width_blocks
    r = tl.program_id(1).to(tl.int64)
    lanes, columns, samples = tl.arange(0, C), width_block * D + tl.arange(0, D), tl.arange(0, N)
    owned = parts + ((stripe * tl.num_programs(1) + r) * wide + columns[:, None]) * padded + samples[None, :]
    part = tl.load(owned)
    h = tl.load(hidden + (r * padded + samples)[:, None] * wide + columns[None, :])
    for tile in range(stripe, n_chunk_tiles, n_stripes):
        held = r * n_held + tile * C + lanes
        rows = (first_tile + tile) * C + lanes
        places = (r * n_outputs + tl.minimum(rows, n_outputs - 1)).to(tl.int64)[:, None] * width + columns[None, :]
        stored = weights_of(weight + places, columns, width, EVEN)
        g = tl.load(gradients + held[:, None] * padded + samples[None, :])
        total = product_of(g, h, tl.zeros((C, D), tl.float32))
        part = product_of(tl.trans(nearest_of(stored, g.dtype)), g, part)
        if width_block == 0:
            bias_total = tl.sum(g.to(tl.float32), 1)
            tl.store(bias_gradient + r * n_outputs + rows, bias_total * scale, mask=rows < n_outputs)
        mask = (rows < n_outputs)[:, None] & (columns < width)[None, :]
        step = tl.load(steps + held) if RULE == ROWS else 0.0
        renew(
            weight, weight, stored, total * scale, step, first, second, lost, slots, numbers, r, rows, columns, places, mask,
            n_outputs, width, n_slots, key, first_row, rate, keep, share_1, share_2, epsilon, RULE, STORAGE, COMPENSATED, False,
        )  # fmt: skip
    tl.store(owned, part)


@triton.jit(do_not_specialize=[*CHANGING, "first_output", "n_here"])
def apply_rule(
    gradient, weight, low, first, second, lost, slots, numbers,
    first_output, n_here, n_outputs, width, n_slots,
    key, first_row, scale, rate, keep, share_1, share_2, epsilon, keep_moment, share, correction,
    RULE: tl.constexpr, STORAGE: tl.constexpr, COMPENSATED: tl.constexpr, COPIES: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Update a chunk's weights from their gradient (R, n_here, width), `scale` times. Program (block of C whole rows; r)."""
    r = tl.program_id(1).to(tl.int64)
    here, columns = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, D)
    mask = (here < n_here)[:, None] & (columns < width)[None, :]
    g = tl.load(gradient + (r * n_here + here)[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    rows = first_output + here
    places = (r * n_outputs + rows)[:, None] * width + columns[None, :]
    step = 0.0
    if RULE == ROWS:
        step = step_sizes(
            second, r * n_outputs + rows, here < n_here, tl.sum(g * g, 1), width, rate, keep_moment, share, correction, epsilon
        )
    stored = tl.load(weight + places, mask=mask, other=0.0)
    renew(
        weight, low, stored, g, step, first, second, lost, slots, numbers, r, rows, columns, places, mask,
        n_outputs, width, n_slots, key, first_row, rate, keep, share_1, share_2, epsilon, RULE, STORAGE, COMPENSATED, COPIES,
    )  # fmt: skip
