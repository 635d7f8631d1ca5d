"""START READING HERE: input layer, MLP, head and label table meet here and in `packed`, and nowhere else.

    x -> input (N, R, D) -> mlp (R, N, D) [-> bottleneck] -> head (N, R, B) -> decoding with the table -> the k best of K labels

`Packed` holds R repetitions side by side on one device and trains them; `Model` holds trained ones and predicts with them.
The full softmax head is the same thing with the identity table: R = 1, B = K.

Axes: N samples, F features, R repetitions, B buckets, D hidden width, K labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from mach.config import Config, Estimator, Precision
from mach.data import CSR, TextVectorizer, take
from mach.decoding import TopK, decode_topk
from mach.decoding.only import Only, allowed_of, check_exclude, check_restrict, joined, no_lists
from mach.decoding.rerank import Reranker
from mach.decoding.topk import check_k
from mach.encoders import make_batch
from mach.errors import ConfigError, DataError, ModelError
from mach.hashing import LabelTable
from mach.packed import INPUT, Batch, Features, Packed, Sizes, feature_buckets, initial_parameters, packed_axis, prior_output

__all__ = [
    "DEFAULT_ESTIMATOR", "INPUT", "Batch", "Features", "Model", "Packed", "Sizes", "chunk_rows", "feature_buckets",
    "initial_parameters", "packed_axis", "prior_output", "resolve_device", "resolve_precision", "resolve_rows",
]  # fmt: skip

SCORE_BYTES = 64 << 20  # of the bucket scores held at once while predicting
FULL_ROWS = 1024  # samples that read the weights of the full head together: enough for the product to be bound by arithmetic
DEFAULT_ESTIMATOR: Estimator = "logits"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Trained repetitions and what is needed to ask them: any subset of an ensemble's repetitions decodes."""

    config: Config
    sizes: Sizes
    table: LabelTable  # of the repetitions held, in their order
    repetitions: Sequence[Packed]  # one each
    device: torch.device
    vectorizer: TextVectorizer | None = None
    label_names: Sequence[str] | None = None
    reranker: Reranker | None = None
    products: torch.dtype | None = None  # in which outputs are made; None: the type of the model

    def __post_init__(self) -> None:
        if len(self.repetitions) != self.table.n_repetitions:
            raise ModelError(f"{len(self.repetitions)} repetitions do not fit a table of {self.table.n_repetitions}")

    def select(self, repetitions: Sequence[int]) -> Model:
        """Give the model of a subset of the repetitions, by their numbers.

        Raises: ConfigError if one of them is not held.
        """
        table = self.table.select(repetitions)
        held = dict(zip(self.table.repetitions, self.repetitions, strict=True))
        return replace(self, table=table, repetitions=[held[r] for r in table.repetitions])

    def bucket_logits(self, features: CSR | np.ndarray) -> np.ndarray:
        """Give the raw outputs of every head, float32 (N, R, B): 4 N R B bytes, so callers take few rows at a time."""
        return self.bucket_outputs(features).cpu().numpy()

    def bucket_outputs(self, features: CSR | np.ndarray) -> Tensor:
        """Give what `bucket_logits` gives, left on the model's device."""
        out = torch.empty(len(features), len(self.repetitions), self.sizes.n_buckets, device=self.device)
        for r, packed in enumerate(self.repetitions):
            if r == 0 or self._feature_buckets is not None:
                batch = self._batch(features, r)
            out[:, r] = packed.logits(batch, self.products)[:, 0]
        return out

    def _batch(self, features: CSR | np.ndarray, r: int) -> Batch:
        """Give the batch of the r-th repetition held; the same for all unless features are hashed."""
        rows = None if self._feature_buckets is None else self._feature_buckets[r : r + 1]
        return make_batch(features, normalize=self.config.normalize, device=self.device, buckets_RF=rows)

    @cached_property
    def _feature_buckets(self) -> np.ndarray | None:
        return feature_buckets(self.config, self.sizes, self.table.repetitions)

    def predict_topk(
        self,
        X: Any,
        k: int = 5,
        *,
        estimator: Estimator = DEFAULT_ESTIMATOR,
        restrict: npt.ArrayLike | None = None,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> TopK:
        """Give the k best labels of each sample, best first, ties by the smaller label id.

        A model with a re-ranker lets it order the first of them anew, where the estimator is "logits": see `Reranker.rerank`.

        Args:    X, N samples: scipy sparse or numpy (N, F), `mach.data.CSR`, or texts if the model was trained on text.
                 estimator, how a label's score is made of its buckets' (`mach.decoding`).
                 restrict, label ids to choose among, for all samples. exclude, N lists of label ids, what each sample may not
                 find.
        Returns: TopK(labels int64 (N, k), scores float32 (N, k)).
        Raises:  ConfigError if k is outside [1, K], a label outside [0, K), or fewer than k labels are left to a sample;
                 DataError if X has another number of features, or is text and the model was not trained on text.
        """
        features = self.features_of(X)
        check_k(k, self.sizes.n_labels)
        subset = None if restrict is None else check_restrict(restrict, self.sizes.n_labels, k)
        lists = None if exclude is None else check_exclude(exclude, len(features), self.sizes.n_labels, subset, k)
        without = None if lists is None else np.split(lists.labels, lists.starts[1:-1])
        n_allowed = (self.sizes.n_labels if subset is None else len(subset)) - max(map(len, without or ()), default=0)
        depth = self.n_decoded(k, n_allowed, estimator)
        parts, start = [], 0
        for rows in self.full_chunks(features) if self.table.is_identity else self.row_chunks(features):
            how: dict[str, Any] = {"estimator": estimator, "restrict": subset}
            if without is not None:
                how["exclude"] = without[start : start + len(rows)]
            if self.table.is_identity:
                top = self.full_topk(rows, depth, first_sample=start, **how)
            else:
                top = decode_topk(self.bucket_outputs(rows), self.table, depth, loss=self.config.loss, **how)
            excluded = None if without is None else how["exclude"]
            parts.append(self.reranked(rows, top, k, estimator=estimator, restrict=subset, exclude=excluded))
            start += len(rows)
        return TopK(np.concatenate([p.labels for p in parts]), np.concatenate([p.scores for p in parts]))

    def n_decoded(self, k: int, n_allowed: int | None = None, estimator: Estimator = DEFAULT_ESTIMATOR) -> int:
        """Give how many labels to decode for k of them: what a re-ranker orders anew too, of `n_allowed` (all K)."""
        if self.reranker is None or estimator != DEFAULT_ESTIMATOR:
            return k
        return max(k, min(self.reranker.depth, self.sizes.n_labels if n_allowed is None else n_allowed))

    def reranked(
        self, features: CSR | np.ndarray, top: TopK, k: int, *, estimator: Estimator = DEFAULT_ESTIMATOR,
        restrict: npt.NDArray[np.int64] | None = None, exclude: Sequence[npt.NDArray[np.int64]] | None = None,
    ) -> TopK:  # fmt: skip
        """Give the k best of decoded labels, the first of them ordered anew if the model has a re-ranker for the estimator.

        Args: restrict and exclude, as `top` was decoded with, checked.
        """
        if self.reranker is None or estimator != DEFAULT_ESTIMATOR or isinstance(features, np.ndarray):
            return top
        lists = no_lists(len(features)) if exclude is None else joined(exclude)
        only = Only(*lists, allowed_of(restrict, self.sizes.n_labels))
        return self.reranker.rerank(features, top, k, len(self.repetitions), only)

    def full_topk(self, features: CSR | np.ndarray, k: int, *, estimator: Estimator = DEFAULT_ESTIMATOR, **how: Any) -> TopK:
        """Decode as `predict_topk` does before re-ranking, for the samples of one of `full_chunks`: the table is the identity."""
        return self.repetitions[0].full_topk(self._batch(features, 0), k, estimator=estimator, products=self.products, **how)

    def row_chunks(self, features: CSR | np.ndarray, n_repetitions: int | None = None) -> Iterator[CSR | np.ndarray]:
        """Cut samples into runs whose bucket scores take at most 64 MiB; at least one run, perhaps empty.

        For `n_repetitions` instead of those held: products of the same shapes round alike.
        """
        n_held = len(self.repetitions) if n_repetitions is None else n_repetitions
        return _runs(features, chunk_rows(n_held, self.sizes.n_buckets))

    def full_chunks(self, features: CSR | np.ndarray) -> Iterator[CSR | np.ndarray]:
        """Cut samples into runs for the full head, whose outputs are never held together; at least one run, perhaps empty."""
        return _runs(features, FULL_ROWS)

    def features_of(self, X: Any) -> CSR | np.ndarray:
        """Turn what a user holds into features of the model's kind; see `predict_topk`."""
        if _is_text(X) or (self.vectorizer is not None and isinstance(X, list | tuple) and not X):
            if self.vectorizer is None:
                raise DataError("the model was trained on features, not on text: give a matrix of features")
            return self.vectorizer.transform([X] if isinstance(X, str) else list(X))
        if not isinstance(X, CSR) and np.ndim(X) != 2:
            raise DataError(f"the samples must be a matrix of features (N, F), got {type(X).__name__} of {np.ndim(X)} axes")
        if self.sizes.features == "dense":
            X = X.to_scipy() if isinstance(X, CSR) else X
            found: CSR | np.ndarray = np.asarray(X.toarray() if sp.issparse(X) else X, dtype=np.float32)
        else:
            found = X if isinstance(X, CSR) else CSR.from_scipy(X)
        width = found.n_columns if isinstance(found, CSR) else found.shape[-1]
        if width != self.sizes.n_features:
            raise DataError(f"the samples have {width} features, the model was trained on {self.sizes.n_features}")
        _refuse_infinite(found)
        return found

    def name_of(self, label: int) -> str:
        """Give a label's name, or its id if labels are only numbers."""
        return str(label) if self.label_names is None else self.label_names[label]


def _runs(features: CSR | np.ndarray, n: int) -> Iterator[CSR | np.ndarray]:
    for start in range(0, max(1, len(features)), n):
        yield take(features, np.arange(start, min(start + n, len(features))))


def chunk_rows(n_repetitions: int, n_buckets: int) -> int:
    """Give how many samples' bucket scores are held at once: at most 64 MiB of them, at least one sample's."""
    return max(1, SCORE_BYTES // (4 * n_repetitions * n_buckets))


def _refuse_infinite(features: CSR | np.ndarray) -> None:
    values = features.values if isinstance(features, CSR) else features
    if values is not None and not np.isfinite(values).all():
        at = np.argwhere(~np.isfinite(values))[0, 0]
        sample = np.searchsorted(features.indptr, at, "right") - 1 if isinstance(features, CSR) else at
        raise DataError(f"sample {sample} holds a value that is not a finite number (NaN or infinite)")


def _is_text(X: Any) -> bool:
    if isinstance(X, np.ndarray):
        return X.ndim == 1 and X.dtype.kind in "UTO" and all(isinstance(x, str) for x in X[:1])
    return isinstance(X, str) or (isinstance(X, Sequence) and len(X) > 0 and isinstance(X[0], str))


def resolve_device(name: str) -> torch.device:
    """Give the device for `auto` (a GPU if there is one), `cpu` or `cuda:i`.

    Raises: ConfigError if the name is none of these, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise ConfigError(f"device={name!r} must be 'auto', 'cpu' or 'cuda:i'")
    if int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """Give the type of the products of training: for `auto`, bfloat16 where the device has instructions for it.

    For `float8` the same: that is the type of the head's outputs alone, and its own affair.
    """
    if name not in ("auto", "float8"):
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has = any(getattr(torch.cpu, question, bool)() for question in asked)  # bool() is False: an older torch cannot tell
    return torch.bfloat16 if has else torch.float32


def resolve_rows(config: Config, features: Features, products: torch.dtype) -> torch.dtype:
    """Give the type in which the input layer's rows are kept, where products run in `products`; dense features have no rows."""
    if features == "dense" or products == torch.float64:
        return torch.float64 if products == torch.float64 else torch.float32
    if config.input_precision == "auto":
        return products
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.input_precision]
