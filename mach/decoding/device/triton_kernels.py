# mypy: ignore-errors
"""The scan in Triton: buckets computed in registers, scores of several samples read at once, only a block's best written.

A program scores a block of J labels for a group of Q samples, or for one. The scores are packed (groups, R, B, Q): a bucket's Q
scores lie side by side, 4 Q bytes, so that one computed bucket answers Q samples with whole sectors of memory. Programs of one
group run one after another, so that the scores of a group, 4 R B Q bytes, are read from the L2 cache.

Nothing but what Triton 3.6 and its interpreter know. Axes: J labels of a block, T labels of a tile, Q samples of a group,
R repetitions, B buckets, G blocks.
"""

import triton
import triton.language as tl

IDENTITY, CARTER_WEGMAN, MULTIPLY_SHIFT, HELD = (tl.constexpr(i) for i in range(4))
SUM, MIN, MEDIAN = (tl.constexpr(i) for i in range(3))  # as in mach.decoding.scan


@triton.jit
def buckets_of(labels, r, words, held, held_mask, n_labels, KIND: tl.constexpr):
    """Give the buckets of labels in a row, below 2**31; `labels`, int64, and `r` are broadcast against each other.

    What is in `words` is told where `mach.hashing.device` writes it.

    Carter-Wegman: a k mod p by Shoup's quotient, floor(k floor(2**32 a / p) / 2**32), less than two below k a / p, as k < 2**32:
    the remainder, taken mod 2**32, is below 2 p < 2**32. y - p wraps to more than y if y < p, so that the smaller of the two is
    y mod p. y mod B likewise, with floor(2**32 / B). All products are of 32 bits.

    Source: Harvey 2014, arXiv:1205.2926, section 2 (Shoup's trick).
    """
    if KIND == CARTER_WEGMAN:
        p, n_buckets, per_bucket = (
            tl.load(words).to(tl.uint32),
            tl.load(words + 1).to(tl.uint32),
            tl.load(words + 2).to(tl.uint32),
        )
        a, ratio = tl.load(words + 3 + 3 * r).to(tl.uint32), tl.load(words + 4 + 3 * r).to(tl.uint32)
        k, b = tl.broadcast(labels.to(tl.uint32), tl.load(words + 5 + 3 * r).to(tl.uint32))
        y = k * a - tl.umulhi(k, ratio + tl.zeros_like(k)) * p
        y = tl.minimum(y, y - p) + b
        y = tl.minimum(y, y - p)
        y -= tl.umulhi(y, per_bucket + tl.zeros_like(y)) * n_buckets
        buckets = tl.minimum(y, y - n_buckets)
    elif KIND == MULTIPLY_SHIFT:
        n_buckets, n_cut, n_kept = (
            tl.load(words).to(tl.uint64),
            tl.load(words + 1).to(tl.uint64),
            tl.load(words + 2).to(tl.uint64),
        )
        a, b = tl.load(words + 3 + 3 * r).to(tl.uint64), tl.load(words + 4 + 3 * r).to(tl.uint64)
        buckets = (((labels.to(tl.uint64) * a + b) >> n_cut) * n_buckets) >> n_kept
    elif KIND == HELD:
        buckets = tl.load(held + r * n_labels + labels).to(tl.int32) & held_mask
    else:
        buckets = labels + (labels - labels) * r
    return buckets.to(tl.int32)


@triton.jit
def scores_of(
    labels_T, group, lanes, n_rows, n_labels, n_buckets, words, held, held_mask,
    KIND: tl.constexpr, AGGREGATE: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Score a tile of labels for some lanes of a group, (T, lanes), in the order of the scan.

    ROWS >= R is a power of 2. WIDE: B Q is 2**31 or more, so that places are int64.
    """
    PLACE: tl.constexpr = tl.int64 if WIDE else tl.int32
    if AGGREGATE == MEDIAN:
        rows = tl.arange(0, ROWS)
        rows_R = tl.minimum(rows, n_rows - 1).to(tl.int64)
        buckets = buckets_of(labels_T[:, None], rows_R[None, :], words, held, held_mask, n_labels, KIND)
        places = (rows_R[None, :] * n_buckets + buckets)[:, None, :] * Q + lanes[None, :, None]
        values = tl.where((rows < n_rows)[None, None, :], tl.load(group + places), float("inf"))
        values = tl.sort(values, dim=2)
        low = tl.sum(tl.where((rows == (n_rows - 1) // 2)[None, None, :], values, 0.0), 2)
        high = tl.sum(tl.where((rows == n_rows // 2)[None, None, :], values, 0.0), 2)
        total = (low + high) * 0.5
    else:
        buckets = buckets_of(labels_T, 0, words, held, held_mask, n_labels, KIND)
        total = tl.load(group + (buckets.to(PLACE)[:, None] * Q + lanes[None, :]))
        for r in range(1, n_rows):
            row = tl.cast(r, tl.int64)
            buckets = buckets_of(labels_T, row, words, held, held_mask, n_labels, KIND)
            value = tl.load(group + row * n_buckets * Q + (buckets.to(PLACE)[:, None] * Q + lanes[None, :]))
            total = total + value if AGGREGATE == SUM else tl.minimum(total, value)
    return total


@triton.jit
def labels_of(block, start, subset, n_allowed, J: tl.constexpr, T: tl.constexpr, HAS_SUBSET: tl.constexpr):
    """Give the labels of a tile of a block, int64 (T,), and which of them exist."""
    positions = block.to(tl.int64) * J + start + tl.arange(0, T)
    exists = positions < n_allowed
    positions = tl.where(exists, positions, 0)
    if HAS_SUBSET:
        return tl.load(subset + positions), exists
    return positions, exists


@triton.jit
def block_maxima(
    packed, words, held, subset, out, held_mask, n_rows, n_labels, n_buckets, n_allowed, n_blocks,
    KIND: tl.constexpr, AGGREGATE: tl.constexpr, HAS_SUBSET: tl.constexpr, ROWS: tl.constexpr,
    J: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the best score of a block for each sample of a group: out (groups Q, G). Program (block, group)."""
    lanes = tl.arange(0, Q)
    sample = tl.program_id(1).to(tl.int64) * Q
    group = packed + sample * n_rows * n_buckets
    best = tl.full((Q,), float("-inf"), tl.float32)
    for start in range(0, J, T):
        labels, exists = labels_of(tl.program_id(0), start, subset, n_allowed, J, T, HAS_SUBSET)
        scores = scores_of(
            labels, group, lanes, n_rows, n_labels, n_buckets, words, held, held_mask, KIND, AGGREGATE, ROWS, Q, WIDE
        )
        best = tl.maximum(best, tl.max(tl.where(exists[:, None], scores, float("-inf")), 0))
    tl.store(out + (sample + lanes) * n_blocks + tl.program_id(0), best)


@triton.jit
def chosen_scores(
    packed, words, held, subset, samples, blocks, out, held_mask, n_rows, n_labels, n_buckets, n_allowed, n_chosen,
    KIND: tl.constexpr, AGGREGATE: tl.constexpr, HAS_SUBSET: tl.constexpr, ROWS: tl.constexpr,
    J: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write all scores of chosen blocks, each for one sample: out (N, M, J), -inf beyond the last label. Program (n M + m)."""
    place = tl.program_id(0).to(tl.int64)
    sample, block = tl.load(samples + place // n_chosen), tl.load(blocks + place)
    lane = (sample % Q).to(tl.int32) + tl.arange(0, 1)
    group = packed + (sample // Q) * Q * n_rows * n_buckets
    for start in range(0, J, T):
        labels, exists = labels_of(block, start, subset, n_allowed, J, T, HAS_SUBSET)
        scores = scores_of(
            labels, group, lane, n_rows, n_labels, n_buckets, words, held, held_mask, KIND, AGGREGATE, ROWS, Q, WIDE
        )
        scores = tl.where(exists[:, None], scores, float("-inf"))
        tl.store(out + place * J + start + tl.arange(0, T)[:, None] + tl.arange(0, 1)[None, :], scores)
