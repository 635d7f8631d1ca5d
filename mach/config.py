"""The settings of a run: one frozen object for the library, the command line and the experiments.

A key of the TOML file, a field here and a flag of `mach train` bear one name (`batch_size`, `--batch-size`).
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mach.errors import ConfigError, nearest

TableKind = Literal["hashed", "identity"]
Family = Literal["carter-wegman", "multiply-shift", "xxhash"]
Loss = Literal["logistic", "softmax", "squared-hinge"]
Precision = Literal["auto", "bfloat16", "float32", "float8"]
InputPrecision = Literal["auto", "bfloat16", "float32"]
HeadPrecision = Literal["float32", "bfloat16", "float8"]
HeadOptimizer = Literal["adamw", "sgd", "rowwise-adagrad", "rowwise-adam"]
Estimator = Literal["mean", "logits", "log-probs", "min", "median"]
AUTO = "auto"
RATE = 4e-3  # peak step size of AdamW; see experiments/accuracy/recipe
WIDTH, FEW_WIDTH = 512, 256  # of the hidden vector, where samples are many and where they are few
MANY_SAMPLES = 50_000  # too many for a repetition to learn by heart: see experiments/accuracy/recipe
MANY_LABELS = 2.0  # a sample, from which labels that look alike go together, and one bucket cannot tell them apart
REPETITIONS, LEAST_REPETITIONS = 8, 2
ONE_LABEL = 1.5  # a sample, below which most name but one, and a bucket of many rare ones is a mixture that is hard to learn
MORE_BUCKETS, FEW_LABELS = 4, 16_384  # times, there, up to so many labels, 4 a bucket: see experiments/accuracy/buckets
SHARED, BOTTLENECK = 2, 64  # labels a bucket where there are more, and the width before such a head
MOST_MIXED = 8  # labels a bucket, there, for fewer repetitions than 8, row by row
MOST_GROUPED = 1_000_000  # labels, whose directions take 2 GB: see mach/hashing/grouping.py
HEAD_RATES = {"sgd": 3.0, "rowwise-adagrad": 0.05}  # what is not here goes by learning_rate


def _setting(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak step sizes: of dense parameters, of the input layer's rows, and of the head."""

    dense: float
    rows: float
    head: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides a repetition's weights, apart from the data. Checked where it is made.

    Raises: ConfigError naming the field, its value and the allowed range.
    """

    table: TableKind = _setting("hashed", "hashed: R small heads of B buckets; identity: one full head of K outputs")
    family: Family = _setting("carter-wegman", "universal family that hashes label ids (xxhash: label names)")
    grouped: float | Literal["auto"] = _setting(
        AUTO,
        "share of the repetitions in which rare labels with similar samples share a bucket, instead of hashed ones; auto: 1 "
        "where a training sample has fewer than two labels and there are at most a million, else 0",
        0,
        1,
    )
    buckets: int | Literal["auto"] = _setting(
        AUTO,
        "B, buckets of a repetition; auto: the power of two nearest to 8 sqrt(K); where a training sample has fewer than 1.5 "
        "labels, of up to 16,384 four times as many, of up to a million K/2",
        2,
    )
    repetitions: int | Literal["auto"] = _setting(
        AUTO,
        "R, independent repetitions; auto: 8, but where a training sample has fewer than 1.5 labels and a bucket at most 8 as "
        "few as have 64 sqrt(K) buckets in all, from 2 on",
        1,
    )
    seed: int = _setting(0, "seed of the hashes, the initial weights and the order of the data", 0, 2**63 - 1)

    hidden: int | Literal["auto"] = _setting(
        AUTO, "D, width of the hidden vector; auto: 256 for fewer than 50,000 samples, else, and of a full head, 512", 1
    )
    layers: int = _setting(0, "residual layers of width D after the input layer", 0, 64)
    dropout: float | Literal["auto"] = _setting(
        AUTO, "share of the hidden vector dropped while training; auto: 0.3 for fewer than 50,000 samples, else none", 0, 0.99
    )
    bottleneck: int | Literal["auto"] = _setting(
        AUTO,
        "width of a linear layer between hidden vector and head, which is then so wide; 0: none; auto: 64 where there are K/2 "
        "buckets or more, of 16,385 to a million labels, and a training sample has fewer than 1.5, else none",
        0,
    )
    normalize: bool = _setting(True, "scale every sample's features to Euclidean length 1")

    feature_buckets: int = _setting(
        0, "hash the features into so many rows, differently in each repetition; 0: a row a feature", 0
    )

    loss: Loss = _setting("logistic", "logistic and squared-hinge: each bucket yes or no; softmax: positives share the mass")
    epochs: int | Literal["auto"] = _setting(
        AUTO,
        "passes over the training samples; auto: 3, or up to 6 so that 100,000 samples are seen and 500 positives an output",
        1,
    )
    batch_size: int = _setting(256, "samples a step", 1)
    learning_rate: float | Literal["auto"] = _setting(
        AUTO,
        "peak step size of AdamW, after the warm-up; auto: 0.004, down to a quarter of it where an output is positive in fewer "
        "than one of 400 samples, or samples are more than 50,000; of a full head, and by rowwise-adam, to a half",
        0,
    )
    input_learning_rate: float | Literal["auto"] = _setting(
        AUTO,
        "peak step size of the input layer's rows (row-wise Adam without momentum); auto: 15 times that for learning_rate",
        0,
    )
    weight_decay: float = _setting(0.0, "decoupled weight decay of AdamW, a step", 0)
    warmup: float = _setting(0.05, "share of the steps over which the step size rises; after it falls as a cosine", 0, 1)

    precision: Precision = _setting(
        AUTO,
        "of matrix products while training; auto: bfloat16 where the device multiplies it fast; float8: as auto, but of a head "
        "that is kept in float8 the outputs are products of float8, too",
    )

    input_precision: InputPrecision = _setting(
        AUTO, "in which rows of the input layer are kept; below float32: rounded stochastically; auto: that of the products"
    )

    head_precision: HeadPrecision | Literal["auto"] = _setting(
        AUTO,
        "in which the head's weights are kept, rounded stochastically to it; auto: bfloat16 for the full head, else float32",
    )
    compensated: float = _setting(
        0.0, "share of the outputs, the most frequent, whose bfloat16 weights keep what rounding loses instead", 0, 1
    )
    head_optimizer: HeadOptimizer | Literal["auto"] = _setting(
        AUTO,
        "of the head; sgd: no state; rowwise-...: one number an output; auto: rowwise-adam for the full head, and where a "
        "training sample has fewer than 1.5 labels and a bucket at most 8, else adamw",
    )
    head_learning_rate: float | Literal["auto"] = _setting(
        AUTO, "peak step size of the head; auto: learning_rate for adamw and rowwise-adam, else one that suits the optimiser", 0
    )
    head_weight_decay: float | Literal["auto"] = _setting(AUTO, "decoupled weight decay of the head; auto: weight_decay", 0)
    head_batch_size: int = _setting(0, "samples a step of the head, several a step of the encoder; 0: batch_size", 0)
    head_memory: int = _setting(0, "MiB that a step takes for a chunk of outputs; 0: 64 on a CPU, 1024 on a GPU", 0, 1 << 20)

    rerank: int | Literal["auto"] = _setting(
        AUTO,
        "best labels of a sample that sparse linear weights order anew, fitted once all repetitions are trained; 0: none; "
        "auto: 20 over sparse features, but for squared-hinge",
        0,
        1000,
    )
    rerank_cost: float | Literal["auto"] = _setting(
        AUTO,
        "of a sample on the wrong side of those weights, C of a linear SVM; auto: the better of 0.2 and 1 on the dev split or "
        "what is held out, else 0.2",
        0,
    )
    rerank_weight: float | Literal["auto"] = _setting(
        AUTO,
        "of their margin beside the mean logit, in a sum of the two and nothing else; auto: that sum, one with likeness to a "
        "label's samples, or networks, for which training samples are kept in the model, as is best on the dev split or what is "
        "held out, else 1.5",
        0,
    )

    validation: float | Literal["auto"] = _setting(
        AUTO,
        "share of the training samples held out when the data set has no dev split; auto: a fortieth, at most 6,000, of 10,000 "
        "or more, where labels are ordered anew",
        0,
        0.9,
    )
    patience: int = _setting(0, "stop a repetition after so many epochs without a better validation P@1; 0: never", 0)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, hint = getattr(self, f.name), hints[f.name]
            _check(f.name, value, hint, f.metadata["low"], f.metadata["high"])
            plain = str(value) if isinstance(value, str) else float(value) if float in (hint, *get_args(hint)) else value
            object.__setattr__(self, f.name, plain)  # equal settings are written alike: 1, 1.0 and numpy's make one run
        if self.compensated and self.head_storage() != "bfloat16":
            raise ConfigError(
                f"compensated={self.compensated:g} needs head_precision='bfloat16', got {self.head_storage()!r}: set that, or "
                "compensated=0"
            )
        if self.precision == "float8" and self.head_storage() != "float8":
            raise ConfigError(
                f"precision='float8' needs head_precision='float8', got {self.head_storage()!r}: set that, or precision='auto'"
            )
        if self.head_batch_size > self.batch_size:
            raise ConfigError(
                f"head_batch_size={self.head_batch_size} must be 0, or lie in [1, {self.batch_size}], the batch_size"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "config") -> Config:
        """Build a config from plain values; an unknown key is refused with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{where}: unknown key '{key}'{nearest(key, known)} (known: {', '.join(known)})")
        settings: dict[str, Any] = {k: v.replace("_", "-") if isinstance(v, str) else v for k, v in values.items()}
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Give every setting as a plain value that TOML and JSON can hold."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Config:
        """Give a copy with some settings changed, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

    def n_buckets(self, n_labels: int, labels_a_sample: float = ONE_LABEL) -> int:
        """Resolve B for K labels: K for the identity table, for `auto` a power of two near 8 sqrt(K), or more.

        Raises: ConfigError if B exceeds K.
        """
        if self.table == "identity":
            return n_labels
        if self.buckets == AUTO:
            wanted = _usual_buckets(n_labels)
            if labels_a_sample < ONE_LABEL and n_labels <= MOST_GROUPED:
                wanted = MORE_BUCKETS * wanted if n_labels <= FEW_LABELS else -(-n_labels // SHARED)
            return max(2, min(n_labels, wanted))
        buckets = int(self.buckets)
        if buckets > n_labels:
            raise ConfigError(f"buckets={buckets} must lie in [2, {n_labels}], the number of labels of this data set")
        return buckets

    def n_hidden(self, n_samples: int) -> int:
        """Resolve D, the width of the hidden vector, for so many training samples."""
        if self.hidden != AUTO:
            return int(self.hidden)
        return FEW_WIDTH if n_samples < MANY_SAMPLES and self.table == "hashed" else WIDTH

    def n_bottleneck(self, n_labels: int, n_outputs: int, labels_a_sample: float, hidden: int) -> int:
        """Resolve the width before a head of so many outputs for K labels, over hidden vectors of width D; 0 is none.

        Where samples name one of many labels, outputs of few numbers each do more than few outputs of many, for the same work.
        """
        if self.bottleneck != AUTO:
            return int(self.bottleneck)
        are_many = labels_a_sample < ONE_LABEL and FEW_LABELS < n_labels <= min(MOST_GROUPED, SHARED * n_outputs)
        return BOTTLENECK if self.table == "hashed" and are_many and hidden > BOTTLENECK else 0

    def share_dropped(self, n_samples: int) -> float:
        """Resolve the share of the hidden vector that is dropped while so many samples are trained on."""
        if isinstance(self.dropout, float):
            return self.dropout
        return 0.3 if n_samples < MANY_SAMPLES else 0.0

    def share_grouped(self, n_labels: int, labels_a_sample: float) -> float:
        """Resolve the share of the repetitions whose buckets are learnt from the training samples."""
        if self.table == "identity":
            return 0.0
        if isinstance(self.grouped, float):
            return self.grouped
        return float(labels_a_sample < MANY_LABELS and n_labels <= MOST_GROUPED)

    def n_epochs(self, n_samples: int, n_outputs: int, labels_a_sample: float) -> int:
        """Resolve the number of passes over so many training samples, for a head of so many outputs."""
        if self.epochs != AUTO:
            return int(self.epochs)
        few_samples, few_positives = 100_000 / n_samples, 500 * n_outputs / max(1.0, n_samples * labels_a_sample)
        return max(3, min(6, math.ceil(max(few_samples, few_positives))))

    def head_storage(self) -> HeadPrecision:
        """Resolve the type in which the head's weights are kept."""
        if self.head_precision == "auto":
            return "bfloat16" if self.table == "identity" else "float32"
        return self.head_precision

    def head_rule(self, n_labels: int, n_outputs: int, labels_a_sample: float) -> HeadOptimizer:
        """Resolve the update rule of a head of so many outputs for K labels."""
        if self.head_optimizer == "auto":
            return "rowwise-adam" if self.table == "identity" or _unmixed(n_labels, n_outputs, labels_a_sample) else "adamw"
        return self.head_optimizer

    def rates(self, n_samples: int, n_labels: int, n_outputs: int, labels_a_sample: float) -> Rates:
        """Resolve the peak step sizes for so many training samples and a head of so many outputs for K labels.

        Adam's steps are as large for an output that is hardly ever positive as for others, and tell it more of noise; and there
        are the more steps the more samples.
        """
        rule = self.head_rule(n_labels, n_outputs, labels_a_sample)
        least = 0.5 if self.table == "identity" or rule == "rowwise-adam" else 0.25
        usual = RATE * min(1.0, max(least, min(400 * labels_a_sample / n_outputs, MANY_SAMPLES / n_samples)))
        dense = self.learning_rate if isinstance(self.learning_rate, float) else usual
        rows = self.input_learning_rate if isinstance(self.input_learning_rate, float) else 15 * usual
        head = self.head_learning_rate
        return Rates(dense, rows, head if isinstance(head, float) else HEAD_RATES.get(rule, dense))

    def head_decay(self) -> float:
        """Resolve the weight decay of the head."""
        return self.head_weight_decay if isinstance(self.head_weight_decay, float) else self.weight_decay

    def n_reranked(self, features: Literal["sparse", "dense"]) -> int:
        """Resolve how many labels of a sample are ordered anew, for features of a kind.

        Raises: ConfigError if some are wanted over dense features.
        """
        if self.rerank == AUTO:
            suits = self.loss != "squared-hinge"  # whose outputs a margin's default weight drowns
            return 20 if suits and features == "sparse" else 0
        if self.rerank and features == "dense":
            raise ConfigError(f"rerank={self.rerank} must be 0 or 'auto' over dense features")
        return int(self.rerank)

    def n_held_out(self, n_samples: int, features: Literal["sparse", "dense"]) -> int:
        """Resolve how many of so many training samples are held out where there is no dev split."""
        if isinstance(self.validation, float):
            return round(self.validation * n_samples)
        return min(6000, n_samples // 40) if n_samples >= 10_000 and self.n_reranked(features) else 0

    def n_repetitions(self, n_labels: int, labels_a_sample: float) -> int:
        """Resolve R for K labels: 1 for the identity table, which is the full head.

        A bucket of rare labels is a mixture that one output learns badly, where a sample names but one of them: fewer repetitions
        of more buckets then have the better outputs for the same work, if that leaves few labels a bucket. See
        experiments/accuracy/buckets.

        Raises: ConfigError if B exceeds K.
        """
        if self.table == "identity":
            return 1
        if self.repetitions != AUTO:
            return int(self.repetitions)
        outputs, buckets = REPETITIONS * _usual_buckets(n_labels), self.n_buckets(n_labels, labels_a_sample)
        few = _unmixed(n_labels, buckets, labels_a_sample)
        return min(REPETITIONS, max(LEAST_REPETITIONS, round(outputs / buckets))) if few else REPETITIONS


def _unmixed(n_labels: int, n_buckets: int, labels_a_sample: float) -> bool:
    """Tell whether a bucket stands for few enough labels to be learnt well, where most samples name but one."""
    return labels_a_sample < ONE_LABEL and n_labels <= MOST_MIXED * n_buckets


def _usual_buckets(n_labels: int) -> int:
    return 1 << round(math.log2(8 * math.sqrt(n_labels)))


def _check(name: str, value: Any, hint: Any, low: float | None, high: float | None) -> None:
    """Raise ConfigError unless the value is of the hinted type and in [low, high]."""
    options = [a for h in (get_args(hint) if get_origin(hint) is not Literal else (hint,)) for a in get_args(h)]
    kinds = tuple(t for t in (hint, *get_args(hint)) if t in (bool, int, float))
    wanted = " or ".join([t.__name__ for t in kinds] + [repr(o) for o in options])
    if isinstance(value, str):
        if value not in options:
            allowed = wanted if kinds else f"one of {', '.join(map(repr, options))}"
            raise ConfigError(f"{name}={value!r} must be {allowed}{nearest(value, options)}")
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits_number = is_number and (float in kinds or (int in kinds and isinstance(value, int)))
    fits = fits_number or (bool in kinds and isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{name}={value!r} must be {wanted}")
    if is_number and not (math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)):
        raise ConfigError(f"{name}={value!r} must lie in [{low}, {'inf' if high is None else high}]")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain values.

    Raises: ConfigError naming the file if it is missing or not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def load_config(path: str | Path) -> Config:
    """Read a config from a TOML file whose keys are the fields of `Config`."""
    return Config.from_dict(read_toml(path), where=str(path))


def dump_toml(config: Config) -> str:
    """Give the config as TOML text that `load_config` reads back to an equal object."""
    import tomli_w

    return tomli_w.dumps(config.to_dict())
