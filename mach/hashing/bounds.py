"""How many buckets and repetitions theory and a memory budget ask for, and what they cost beside the full head.

Symbols: K labels, B buckets, R repetitions, D hidden width, F input features. A weight is a float32, 4 bytes, unless the settings
of the head say otherwise.
Source of the bounds: Medini et al. 2019, "Extreme classification in log memory using count-min sketch" (MACH),
arXiv:1910.13830, the theorem on identifiability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mach.config import ONE_LABEL, WIDTH, Config, HeadOptimizer
from mach.errors import ConfigError
from mach.hashing.families import MAX_LABELS
from mach.hashing.table import table_bytes

WEIGHT_BYTES = 4  # but the head's, which may be stored in less
HEAD_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
ADAMW_COPIES = 3  # the weights and the two moments
DEFAULTS = Config()
FULL = Config(table="identity")
LEAST_HIDDEN = 32
LEAST_BUCKETS = 16


def repetitions_for(n_labels: int, n_buckets: int, delta: float) -> int:
    """Give R = ceil(2 log(K / sqrt(2 delta)) / log B): all labels can be told apart with probability at least 1 - delta.

    Two labels cannot be told apart if they share a bucket in every repetition: probability B**-R a pair, and there are
    fewer than K**2 / 2 pairs. At least 1; an exact power is not rounded up.

    Raises: ConfigError if delta is outside (0, 1), or B outside [2, K].
    """
    _check(n_labels, n_buckets)
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} must lie in (0, 1), a probability of failure")
    return max(1, math.ceil(round(2 * math.log(n_labels / math.sqrt(2 * delta)) / math.log(n_buckets), 9)))


def failure_probability(n_labels: int, n_buckets: int, n_repetitions: int) -> float:
    """Bound the probability that some two labels share a bucket in every repetition: min(1, K**2 / 2 * B**-R).

    The inverse of `repetitions_for`. Raises: ConfigError if B is outside [2, K], or R below 1.
    """
    _check(n_labels, n_buckets, n_repetitions)
    return math.exp(min(0.0, 2 * math.log(n_labels) - math.log(2) - n_repetitions * math.log(n_buckets)))


def expected_collisions(n_labels: int, n_buckets: int, n_repetitions: int) -> tuple[float, float]:
    """Give how many other labels share a label's bucket, expected: in one repetition, (K-1)/B, and in all, (K-1)/B**R.

    Raises: ConfigError if B is outside [2, K], or R below 1.
    """
    _check(n_labels, n_buckets, n_repetitions)
    return (n_labels - 1) / n_buckets, math.exp(math.log(n_labels - 1) - n_repetitions * math.log(n_buckets))


def encoder_parameters(n_features: int, hidden: int, layers: int) -> int:
    """Count the weights of one encoder: F D + D, and D**2 + D for each residual layer."""
    return n_features * hidden + hidden + layers * (hidden * hidden + hidden)


def head_parameters(n_buckets: int, hidden: int) -> int:
    """Count the weights of one head: B D + B."""
    return n_buckets * hidden + n_buckets


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a model takes, all repetitions together."""

    encoder_parameters: int
    head_parameters: int
    parameters: int
    weight_bytes: int  # as stored
    table_bytes: int  # label -> bucket, held
    training_bytes: int  # weights, what the optimisers keep of them (of a row of the input layer: one moment), the table
    encoder_multiply_adds: int  # a sample, forward
    head_multiply_adds: int  # a sample, forward


def ensemble_cost(
    *,
    n_labels: int,
    n_buckets: int,
    n_repetitions: int,
    hidden: int,
    n_features: int,
    layers: int = 0,
    active_features: int | None = None,
    settings: Config = DEFAULTS,
    labels_a_sample: float = ONE_LABEL,
    input_bytes: int = WEIGHT_BYTES,
) -> Cost:
    """Count what R repetitions cost, each with its own encoder, a head of B outputs and its row of the held table.

    `active_features` is how many features a sample has on average, for sparse inputs; by default all F. Of the settings, those
    count that say how wide the head is, how it is stored and by what rule it trains, which may depend on how many labels a sample
    has. A weight of the input layer takes
    `input_bytes`.

    Raises: ConfigError if B is outside [2, K], or R below 1.
    """
    _check(n_labels, n_buckets, n_repetitions)
    table, rule = table_bytes(n_labels, n_buckets, 1), settings.head_rule(n_labels, n_buckets, labels_a_sample)
    narrow = settings.n_bottleneck(n_labels, n_buckets, labels_a_sample, hidden)
    one = _cost(n_buckets, hidden, narrow, n_features, layers, active_features, table, settings, rule, input_bytes)
    return Cost(**{name: n_repetitions * value for name, value in dataclasses.asdict(one).items()})


def full_cost(*, n_labels: int, hidden: int, n_features: int, layers: int = 0, active_features: int | None = None) -> Cost:
    """Count what the full head of K outputs over one such encoder costs: R = 1, B = K, and an identity table that is not held."""
    return _cost(n_labels, hidden, 0, n_features, layers, active_features, table=0, settings=FULL, rule="rowwise-adam")


def _cost(
    n_buckets: int, hidden: int, narrow: int, n_features: int, layers: int, active: int | None, table: int, settings: Config,
    rule: HeadOptimizer, input_bytes: int = WEIGHT_BYTES,
) -> Cost:  # fmt: skip
    """Count one encoder, one head, behind a bottleneck unless `narrow` is 0, and a table of so many bytes."""
    width = narrow or hidden
    narrowing = hidden * narrow
    encoder, head = encoder_parameters(n_features, hidden, layers) + narrowing, head_parameters(n_buckets, width)
    head_bytes = HEAD_BYTES[settings.head_storage()] * n_buckets * width + WEIGHT_BYTES * n_buckets
    dense_bytes = WEIGHT_BYTES * (encoder - n_features * hidden)
    rows_bytes = input_bytes * n_features * hidden  # the input layer keeps one moment a row, not two a weight
    return Cost(
        encoder_parameters=encoder,
        head_parameters=head,
        parameters=encoder + head,
        weight_bytes=rows_bytes + dense_bytes + head_bytes,
        table_bytes=table,
        training_bytes=ADAMW_COPIES * dense_bytes + rows_bytes + WEIGHT_BYTES * n_features + head_bytes
        + _head_state_bytes(n_buckets, width, rule, settings.compensated) + table,
        encoder_multiply_adds=(n_features if active is None else active) * hidden + layers * hidden * hidden + narrowing,
        head_multiply_adds=n_buckets * width,
    )  # fmt: skip


def _head_state_bytes(n_buckets: int, width: int, rule: HeadOptimizer, compensated: float) -> int:
    """Count what the head's rule keeps, in float32 whatever the storage, and what compensation does, in bfloat16."""
    kept = {"sgd": 0, "adamw": 2 * head_parameters(n_buckets, width)}.get(rule, 2 * n_buckets)
    return WEIGHT_BYTES * kept + 2 * round(compensated * n_buckets) * width


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Proposed sizes for K labels, what they promise, and what they cost beside the full head of the same hidden width."""

    n_labels: int  # K
    n_buckets: int  # B
    n_repetitions: int  # R
    hidden: int  # D
    failure_probability: float  # that some two labels cannot be told apart
    collisions_one: float  # expected labels that share a label's bucket in one repetition
    collisions_all: float  # ... in every repetition
    hashed: Cost
    full: Cost


def propose(
    n_labels: int,
    n_features: int | None = None,
    memory_bytes: int | None = None,
    delta: float = 0.01,
    hidden: int = WIDTH,
    active_features: int | None = None,
    labels_a_sample: float = ONE_LABEL,
) -> Plan:
    """Propose B, R and D for K labels, so that training all repetitions at once fits a memory budget.

    Without a budget: B as the configuration's `auto`, R the larger of the configuration's and what delta asks for, D as given;
    both depend on how many labels a sample has.
    To fit, first D is halved, down to 32, as no bound depends on it; then R falls to what delta asks for; then B is halved,
    down to 16, with the R that delta then asks for. The first sizes that fit are taken.
    Without `n_features` the encoders' input layers are left out of the count.

    Raises: ConfigError if even the smallest does not fit, saying how much it takes, or if K or delta is out of range.
    """
    features = n_features or 0
    cheapest = math.inf
    for n_buckets, n_repetitions, width in _shrinking(n_labels, delta, hidden, labels_a_sample):
        hashed = ensemble_cost(
            n_labels=n_labels,
            n_buckets=n_buckets,
            n_repetitions=n_repetitions,
            hidden=width,
            n_features=features,
            active_features=active_features,
            labels_a_sample=labels_a_sample,
        )
        cheapest = min(cheapest, hashed.training_bytes)
        if memory_bytes is None or hashed.training_bytes <= memory_bytes:
            one, every = expected_collisions(n_labels, n_buckets, n_repetitions)
            return Plan(
                n_labels=n_labels,
                n_buckets=n_buckets,
                n_repetitions=n_repetitions,
                hidden=width,
                failure_probability=failure_probability(n_labels, n_buckets, n_repetitions),
                collisions_one=one,
                collisions_all=every,
                hashed=hashed,
                full=full_cost(n_labels=n_labels, hidden=width, n_features=features, active_features=active_features),
            )
    raise ConfigError(
        f"memory={memory_bytes} bytes is too little: the smallest sizes for {n_labels} labels take {cheapest} bytes to train "
        "all repetitions at once; give more, or train repetitions one after another"
    )


def _shrinking(n_labels: int, delta: float, hidden: int, labels_a_sample: float) -> Iterator[tuple[int, int, int]]:
    """Give sizes (B, R, D) from the wanted ones to the smallest, in the order in which they are to be given up."""
    if hidden < 1:
        raise ConfigError(f"hidden={hidden} must be 1 or more")
    if not 2 <= n_labels <= MAX_LABELS:
        raise ConfigError(f"n_labels={n_labels} must lie in [2, {MAX_LABELS}]")
    n_buckets = DEFAULTS.n_buckets(n_labels, labels_a_sample)
    least = repetitions_for(n_labels, n_buckets, delta)
    most = max(DEFAULTS.n_repetitions(n_labels, labels_a_sample), least)
    yield n_buckets, most, hidden
    while hidden // 2 >= LEAST_HIDDEN:
        hidden //= 2
        yield n_buckets, most, hidden
    for n_repetitions in range(most - 1, least - 1, -1):
        yield n_buckets, n_repetitions, hidden
    while n_buckets // 2 >= LEAST_BUCKETS:
        n_buckets //= 2
        yield n_buckets, repetitions_for(n_labels, n_buckets, delta), hidden


def _check(n_labels: int, n_buckets: int, n_repetitions: int = 1) -> None:
    if not 2 <= n_buckets <= n_labels:
        raise ConfigError(f"n_buckets={n_buckets} must lie in [2, {n_labels}], the number of labels")
    if n_repetitions < 1:
        raise ConfigError(f"n_repetitions={n_repetitions} must be 1 or more")
