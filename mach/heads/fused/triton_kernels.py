# mypy: ignore-errors
"""The head's step in Triton, first half: outputs and what the loss makes of them; `triton_update_kernels` changes the weights.

    log_totals           softmax only: log-sum-exp over all outputs, by running maximum and sum
    positive_gradients   dLoss/dz of the positives, each a product of its own
    output_gradients     a tile of outputs and samples: z = h W^T + b, then dLoss/dz, written (R, C, N)
    slopes               the same in place of a tile of outputs that torch's library made, without their biases

Sums of products are float32. A program adds in a fixed order and owns what it writes: no atomics, the same bits every time.
Outputs are the rows of every product, so that its M is large whatever the batch.

Nothing but what Triton 3.6 knows. Its interpreter neither multiplies nor rounds to bfloat16: `product_of` and `nearest_of` do it
in float32 and integers there. Axes: R repetitions, B outputs, C outputs of a tile, N samples of a block, D hidden width or a
block of it; `padded` samples and `wide` hidden units are whole blocks, zeros beyond what is there.
"""

import triton
import triton.language as tl

from mach.gpu.triton_rounding import INTERPRETED, nearest_of

LOGISTIC, SQUARED_HINGE, SOFTMAX = (tl.constexpr(i) for i in range(3))
PLAIN, BFLOAT16, FLOAT8 = (tl.constexpr(i) for i in range(3))  # storage of the weights
CHANGING = ["first_tile", "n_chunk_tiles", "n_samples", "n_positives", "key"]  # from launch to launch: one kernel for all values


@triton.jit
def product_of(a, b, total):
    """Add a product of bfloat16, of float8 or of float32 numbers, without TF32, to sums in float32.

    Hopper adds up products of float8 in some 14 bits for as long as it may: here within a slice of 128 hidden units at most,
    whose sum is added in float32. Source: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    if a.dtype == tl.float8e4nv:
        return tl.dot(a, b, total, max_num_imprecise_acc=a.shape[1])
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def weights_of(places_CD, columns_D, width, EVEN: tl.constexpr):
    """Read a block of stored weights, zeros beyond the width."""
    if EVEN:
        return tl.load(places_CD)
    return tl.load(places_CD, mask=(columns_D < width)[None, :], other=0.0)


@triton.jit
def outputs_of(
    hidden, scales, weight, bias, rows_C, samples_N, r, n_outputs, width, padded, wide,
    STORAGE: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Give the outputs of a tile, float32 (C, N); rows are existing ones. Hidden vectors in float8 are in units of `scales`."""
    columns = tl.arange(0, D)
    places = weight + (r * n_outputs + rows_C).to(tl.int64)[:, None] * width + columns[None, :]
    hiddens = hidden + (r * padded + samples_N)[None, :] * wide + columns[:, None]
    z = tl.zeros((C, N), tl.float32)
    for d in range(0, width, D):
        h = tl.load(hiddens + d)
        w = weights_of(places + d, columns + d, width, EVEN)
        z = product_of(nearest_of(w, h.dtype), h, z)
    if STORAGE == FLOAT8:
        z *= 0.03125
    if hidden.dtype.element_ty == tl.float8e4nv:
        z *= tl.load(scales + r * padded + samples_N)[None, :]
    return z + tl.load(bias + r * n_outputs + rows_C)[:, None]


@triton.jit
def log_totals(
    hidden, scales, weight, bias, out, n_outputs, width, padded, wide, n_tiles, n_blocks,
    STORAGE: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp over every S-th tile: out (S, R, padded). Program (stripe S and block of samples, repetition)."""
    block, stripe = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    n_stripes = tl.num_programs(0) // n_blocks
    r = tl.program_id(1).to(tl.int64)
    samples = block * N + tl.arange(0, N)
    top, total = tl.full((N,), float("-inf"), tl.float32), tl.zeros((N,), tl.float32)
    for tile in range(stripe, n_tiles, n_stripes):
        rows = tile * C + tl.arange(0, C)
        inside = tl.minimum(rows, n_outputs - 1)
        z = outputs_of(hidden, scales, weight, bias, inside, samples, r, n_outputs, width, padded, wide, STORAGE, EVEN, C, N, D)
        z = tl.where((rows < n_outputs)[:, None], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[None, :]), 0)
        top = higher
    tl.store(out + (stripe * tl.num_programs(1) + r) * padded + samples, top + tl.log(total))


@triton.jit
def log1p_of(x):
    """Give log(1 + x) for x in [0, 1], to the last bits: 2 atanh(x / (2 + x)) as a series in numbers up to 1/9."""
    t = x / (2 + x)
    s = t * t
    series = 1 / 11 + s * (1 / 13 + s * (1 / 15))
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * series))))
    return 2 * t * series


@triton.jit
def slope_of(z, sign, LOSS: tl.constexpr):
    """Give dLoss/dz of outputs of the logistic loss or the squared hinge; sign -1 where positive, 1 elsewhere."""
    if LOSS == LOGISTIC:
        return sign * tl.sigmoid(sign * z)  # sigmoid(z) - 1 would lose the small ones
    return 2 * sign * tl.maximum(1 + sign * z, 0.0)


@triton.jit
def loss_of(z, sign, LOSS: tl.constexpr):
    """Give the loss whose slope `slope_of` gives."""
    if LOSS == LOGISTIC:
        return tl.maximum(sign * z, 0.0) + log1p_of(tl.exp(-tl.abs(z)))
    gap = tl.maximum(1 + sign * z, 0.0)
    return gap * gap


@triton.jit(do_not_specialize=CHANGING)
def positive_gradients(
    hidden, scales, weight, bias, buckets, samples_of, repetitions_of, log_total, share, out, losses,
    n_positives, n_outputs, width, padded, wide,
    LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, STORAGE: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write dLoss/dz of P positives: out (n), and if wanted the loss of each, for logistic and hinge less that as a negative."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    exists = p < n_positives
    b, r = tl.load(buckets + p, mask=exists, other=0), tl.load(repetitions_of + p, mask=exists, other=0).to(tl.int64)
    output, sample = r * n_outputs + b, r * padded + tl.load(samples_of + p, mask=exists, other=0)
    total = tl.zeros((P, D), tl.float32)
    for d in range(0, width, D):
        columns = d + tl.arange(0, D)
        h = tl.load(hidden + sample[:, None] * wide + columns[None, :], mask=(columns < width)[None, :], other=0.0)
        w = tl.load(weight + output[:, None] * width + columns[None, :], mask=(columns < width)[None, :], other=0.0)
        total += nearest_of(w, h.dtype).to(tl.float32) * h.to(tl.float32)
    z = tl.sum(total, 1)
    if STORAGE == FLOAT8:
        z *= 0.03125
    if hidden.dtype.element_ty == tl.float8e4nv:
        z *= tl.load(scales + sample)
    z += tl.load(bias + output)
    if LOSS == SOFTMAX:
        below, part = z - tl.load(log_total + sample), tl.load(share + sample)
        g = tl.exp(below) - part
        loss = -part * below
    else:
        g = slope_of(z, -1.0, LOSS)
        loss = loss_of(z, -1.0, LOSS) - loss_of(z, 1.0, LOSS)
    tl.store(out + p, g, mask=exists)
    if WANT_LOSS:
        tl.store(losses + p, loss, mask=exists)


@triton.jit(do_not_specialize=CHANGING)
def output_gradients(
    hidden, scales, weight, bias, buckets, samples_of, at_positives, offsets, log_total, share, out, losses,
    first_tile, n_outputs, n_samples, width, padded, wide, n_tiles, n_blocks, n_held,
    LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, STORAGE: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write dLoss/dz of a tile of outputs and a block of samples: out (R, held, padded), zeros where there is none.

    All are taken for negatives; then the tile's own positives, P at a time, are written over them.
    Program (tile of the chunk and block, repetition): the blocks of a tile run together and share its weights in the cache.
    losses (R, tiles, blocks), if wanted, takes the summed loss of each, without what positives change.
    """
    block, tile = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    r = tl.program_id(1).to(tl.int64)
    lanes, samples = tl.arange(0, C), block * N + tl.arange(0, N)
    rows = (first_tile + tile) * C + lanes
    inside = tl.minimum(rows, n_outputs - 1)
    z = outputs_of(hidden, scales, weight, bias, inside, samples, r, n_outputs, width, padded, wide, STORAGE, EVEN, C, N, D)
    exists = (rows < n_outputs)[:, None] & (samples < n_samples)[None, :]
    if LOSS == SOFTMAX:
        g = tl.exp(z - tl.load(log_total + r * padded + samples)[None, :])
        exists = exists & (tl.load(share + r * padded + samples) > 0)[None, :]
    else:
        g = slope_of(z, 1.0, LOSS)
        if WANT_LOSS:
            total = tl.sum(tl.where(exists, loss_of(z, 1.0, LOSS), 0.0))
            tl.store(losses + (r * n_tiles + first_tile + tile) * n_blocks + block, total)
    corner = out + (r * n_held + tile * C) * padded
    tl.store(corner + lanes[:, None] * padded + samples[None, :], nearest_of(tl.where(exists, g, 0.0), out.dtype.element_ty))
    tl.debug_barrier()  # these before those: they go to the same places
    place = r * (n_tiles + 1) + first_tile + tile
    begin, end = tl.load(offsets + place), tl.load(offsets + place + 1)
    for p in range(begin, end, P):
        positives = p + tl.arange(0, P)
        row = tl.load(buckets + positives, mask=positives < end, other=0) - (first_tile + tile) * C
        sample = tl.load(samples_of + positives, mask=positives < end, other=-1)
        g_P = nearest_of(tl.load(at_positives + positives, mask=positives < end, other=0.0), out.dtype.element_ty)
        tl.store(corner + row * padded + sample, g_P, mask=(positives < end) & (sample // N == block))


@triton.jit(do_not_specialize=CHANGING)
def slopes(
    z, bias, bias_gradient, buckets, samples_of, at_positives, offsets, losses,
    first_tile, n_chunk_tiles, n_held, n_outputs, n_samples, n_tiles, scale,
    LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Turn outputs without their biases, z (R, N, held), into dLoss/dz, a tile of C outputs at a time.

    As `output_gradients`: all are negatives first, then the tile's positives are written over them. Program (tile of the chunk
    and S-th stripe of samples, repetition). Bias_gradient (S, R, held) and, if wanted, losses (S, R, tiles) take its part of
    sums; the latter without what positives change. What is held beyond the last output comes to nothing.
    """
    n_stripes = tl.num_programs(0) // n_chunk_tiles
    tile, stripe = tl.program_id(0) // n_stripes, tl.program_id(0) % n_stripes
    r, R = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    lanes = tl.arange(0, C)
    rows = (first_tile + tile) * C + lanes
    beta = tl.load(bias + r * n_outputs + rows, mask=rows < n_outputs, other=0.0)
    corner = z + r * n_samples * n_held + tile * C
    each = tl.cdiv(tl.cdiv(n_samples, n_stripes), N) * N
    begin, end = stripe * each, tl.minimum((stripe + 1) * each, n_samples)
    totals, loss = tl.zeros((N, C), tl.float32), tl.zeros((C,), tl.float32)
    for n in range(begin, end, N):
        samples = n + tl.arange(0, N)
        places = corner + samples.to(tl.int64)[:, None] * n_held + lanes[None, :]
        value = tl.load(places, mask=(samples < end)[:, None], other=0.0).to(tl.float32) + beta[None, :]
        g = nearest_of(slope_of(value, 1.0, LOSS), z.dtype.element_ty)
        tl.store(places, g, mask=(samples < end)[:, None])
        totals += tl.where((samples < end)[:, None], g.to(tl.float32), 0.0)
        if WANT_LOSS:
            exists = (samples < end)[:, None] & (rows < n_outputs)[None, :]
            loss += tl.sum(tl.where(exists, loss_of(value, 1.0, LOSS), 0.0), 0)
    total = tl.sum(totals, 0)
    tl.debug_barrier()  # these before those: they go to the same places
    place = r * (n_tiles + 1) + first_tile + tile
    last = tl.load(offsets + place + 1)
    for p in range(tl.load(offsets + place), last, P):
        positives = p + tl.arange(0, P)
        sample = tl.load(samples_of + positives, mask=positives < last, other=-1)
        mine = (sample >= begin) & (sample < end)
        lane = tl.load(buckets + positives, mask=mine, other=0) - (first_tile + tile) * C
        where = corner + sample.to(tl.int64) * n_held + lane
        before = tl.load(where, mask=mine, other=0.0).to(tl.float32)
        g = nearest_of(tl.load(at_positives + positives, mask=mine, other=0.0), z.dtype.element_ty)
        tl.debug_barrier()  # threads that share a positive have all read it
        tl.store(where, g, mask=mine)
        change = tl.where(mine, g.to(tl.float32) - before, 0.0)
        total += tl.sum(tl.where(lane[:, None] == lanes[None, :], change[:, None], 0.0), 0)
    tl.store(bias_gradient + (stripe * R + r) * n_held + tile * C + lanes, total * scale)
    if WANT_LOSS:
        tl.store(losses + (stripe * R + r) * n_chunk_tiles + tile, tl.sum(loss))
