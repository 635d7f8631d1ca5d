"""One tree method on XC text: Parabel or Bonsai (omikuji), or XR-Linear (PECOS). Runs in an environment of its own.

    pip install omikuji scikit-learn          then    python experiments/speed/peers.py parabel DATA [--exclude KNOWN]
    pip install libpecos "numpy<2" scikit-learn       python experiments/speed/peers.py xr-linear DATA [--exclude KNOWN]

DATA is a folder with train.txt and test.txt. All with their own defaults, rows scaled to length 1, all cores. KNOWN has a line a
test sample of label ids between blanks, which it may not find, as `mach predict --exclude` takes it. Prints one line of
JSON: seconds of training (omikuji's hold the reading of its text), milliseconds a query, P@1, P@3, P@5 over all test samples.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_svmlight_file
from sklearn.preprocessing import MultiLabelBinarizer, normalize

Answer = tuple[list[list[int]], float, float]  # the k best labels of each test sample, seconds of training and of prediction


def read(file: Path) -> tuple[Any, list[list[int]], int]:
    """Read XC text: features (N, F) scaled, the labels of each sample, and K."""
    with open(file, "rb") as lines:
        _, n_features, n_labels = map(int, lines.readline().split())
        X, labels = load_svmlight_file(lines, n_features=n_features, multilabel=True, zero_based=True, dtype=np.float32)
    return normalize(X.tocsr()), [[int(label) for label in row] for row in labels], n_labels


def parabel(X: Any, labels: list[list[int]], n_labels: int, X_test: Any, k: int, **settings: Any) -> Answer:
    """Train and predict with omikuji's defaults, but for some settings; see `Answer`."""
    import omikuji

    threads, wanted = os.cpu_count() or 1, omikuji.Model.default_hyper_param()
    for name, value in settings.items():
        setattr(wanted, name, value)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.txt"
        with open(file, "w") as out:
            out.write(f"{X.shape[0]} {X.shape[1]} {n_labels}\n")
            for i, row in enumerate(labels):
                entries = slice(X.indptr[i], X.indptr[i + 1])
                pairs = " ".join(f"{f}:{v:.7g}" for f, v in zip(X.indices[entries], X.data[entries], strict=True))
                out.write(f"{','.join(map(str, row))} {pairs}".rstrip() + "\n")
        began = time.perf_counter()
        model = omikuji.Model.train_on_data(str(file), wanted, threads)
        trained = time.perf_counter()
    model.init_prediction_thread_pool(threads)
    rows = [slice(X_test.indptr[i], X_test.indptr[i + 1]) for i in range(X_test.shape[0])]
    queries = [list(zip(X_test.indices[r].tolist(), X_test.data[r].tolist(), strict=True)) for r in rows]
    ready = time.perf_counter()
    found = [[label for label, _ in model.predict(query, top_k=k)] for query in queries]
    return found, trained - began, time.perf_counter() - ready


def bonsai(X: Any, labels: list[list[int]], n_labels: int, X_test: Any, k: int) -> Answer:
    """Train and predict with omikuji's shallow, unbalanced trees."""
    return parabel(X, labels, n_labels, X_test, k, cluster_balanced=False, cluster_k=100, max_depth=3)


def xr_linear(X: Any, labels: list[list[int]], n_labels: int, X_test: Any, k: int) -> Answer:
    """Train and predict with PECOS' defaults."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    binarizer = MultiLabelBinarizer(classes=range(n_labels), sparse_output=True)
    Y, threads = binarizer.fit_transform(labels).astype(np.float32).tocsr(), os.cpu_count() or 1
    began = time.perf_counter()
    embedding = LabelEmbeddingFactory.create(Y, X, method="pifa")
    clusters = Indexer.gen(embedding, indexer_type="hierarchicalkmeans", threads=threads)
    model = XLinearModel.train(X, Y, C=clusters, threads=threads)
    trained = time.perf_counter()
    scores = model.predict(X_test, only_topk=k, threads=threads)
    seconds = time.perf_counter() - trained
    parts = [slice(scores.indptr[i], scores.indptr[i + 1]) for i in range(scores.shape[0])]
    return [scores.indices[p][np.argsort(-scores.data[p], kind="stable")].tolist() for p in parts], trained - began, seconds


METHODS = {"parabel": parabel, "bonsai": bonsai, "xr-linear": xr_linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--exclude", type=Path)
    args = parser.parse_args()
    X, labels, n_labels = read(args.data / "train.txt")
    X_test, truth, _ = read(args.data / "test.txt")
    lines = args.exclude.read_text().splitlines() if args.exclude else [""] * len(truth)
    known = [set(map(int, line.split())) for line in lines]
    found, train_s, predict_s = METHODS[args.method](X, labels, n_labels, X_test, 5 + max(map(len, known)))
    found = [[label for label in row if label not in out] for row, out in zip(found, known, strict=True)]
    hits = {k: sum(len(set(row[:k]) & set(true)) for row, true in zip(found, truth, strict=True)) for k in (1, 3, 5)}
    figures = {f"P@{k}": round(100 * n / (k * len(truth)), 2) for k, n in hits.items()}
    times = {"train_s": round(train_s, 1), "predict_ms": round(1e3 * predict_s / len(truth), 3)}
    print(json.dumps({"method": args.method, "data": args.data.name, **times, **figures}))


if __name__ == "__main__":
    main()
