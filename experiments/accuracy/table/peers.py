"""What a peer reaches on XC text: a line of the table. Runs in an environment of its own, from the top of the repository.

    pip install omikuji napkinxc scikit-learn numba         PYTHONPATH=. python experiments/accuracy/table/peers.py bonsai DATA
    pip install libpecos "numpy<2" scikit-learn numba       PYTHONPATH=. python experiments/accuracy/table/peers.py xr-linear DATA
    pip install -e .                                        python experiments/accuracy/table/peers.py knn DATA

DATA are folders with train.txt and test.txt. Methods: parabel and bonsai (omikuji), plt (napkinXC), xr-linear (PECOS), knn (20
training samples by cosine, each with its labels). All as their authors set them, rows scaled to length 1, all cores, --runs N
times, for omikuji's trees differ from run to run. --exclude FILE has a line a test sample of label ids between blanks, which it
may not find, as `mach predict --exclude` takes it. Prints Markdown as run.py does: the 100 best labels of the test split,
seconds of training (omikuji's hold the reading of its text), the size of what it writes, milliseconds a query.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.datasets import load_svmlight_file
from sklearn.preprocessing import normalize

from mach.metrics import Evaluator, propensities

TOP_K = 100
NEIGHBOURS = 20
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
METRICS = (("P@1", "P@3", "P@5"), ("PSP@1", "PSP@3", "PSP@5"), ("R@10",), ("R@100",))
Lists = Iterable[Any]  # of each test sample, its k best labels
Answer = tuple[Lists, float, float]  # these, seconds of training and of prediction


def read(file: Path) -> tuple[Any, Any]:
    """Read XC text: features (N, F), rows scaled, and labels (N, K), both CSR."""
    with open(file, "rb") as lines:
        _, n_features, n_labels = map(int, lines.readline().split())
        X, labels = load_svmlight_file(lines, n_features=n_features, multilabel=True, zero_based=True, dtype=np.float32)
    indptr = np.cumsum([0, *map(len, labels)])
    indices = np.array([label for row in labels for label in sorted(row)], dtype=np.int64)
    return normalize(X.tocsr()), sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), (len(labels), n_labels))


def rows(matrix: Any) -> list[Any]:
    """Give the ids of each row of a CSR matrix."""
    return np.split(matrix.indices, matrix.indptr[1:-1])


def best(scores: Any, k: int) -> list[Any]:
    """Give the k ids of the largest values of each row of a CSR matrix, best first."""
    values = np.split(scores.data, scores.indptr[1:-1])
    return [ids[np.argsort(-row, kind="stable")[:k]] for ids, row in zip(rows(scores), values, strict=True)]


def parabel(X: Any, Y: Any, X_test: Any, k: int, folder: Path, **settings: Any) -> Answer:
    """Train and predict with omikuji's defaults, but for some settings."""
    import omikuji

    wanted = omikuji.Model.default_hyper_param()
    for name, value in settings.items():
        setattr(wanted, name, value)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "train.txt"
        with open(file, "w") as out:
            out.write(f"{X.shape[0]} {X.shape[1]} {Y.shape[1]}\n")
            for labels, features, values in zip(rows(Y), rows(X), np.split(X.data, X.indptr[1:-1]), strict=True):
                pairs = " ".join(f"{f}:{v:.7g}" for f, v in zip(features, values, strict=True))
                out.write(f"{','.join(map(str, labels))} {pairs}".rstrip() + "\n")
        began = time.perf_counter()
        model = omikuji.Model.train_on_data(str(file), wanted, THREADS)
        train_s = time.perf_counter() - began
    model.save(str(folder / "model"))
    model.init_prediction_thread_pool(THREADS)
    values = np.split(X_test.data, X_test.indptr[1:-1])
    queries = [list(zip(f.tolist(), v.tolist(), strict=True)) for f, v in zip(rows(X_test), values, strict=True)]
    ready = time.perf_counter()
    found = [[label for label, _ in model.predict(query, top_k=k)] for query in queries]
    return found, train_s, time.perf_counter() - ready


def bonsai(X: Any, Y: Any, X_test: Any, k: int, folder: Path) -> Answer:
    """Train and predict with omikuji's shallow, unbalanced trees."""
    return parabel(X, Y, X_test, k, folder, cluster_balanced=False, cluster_k=100, max_depth=3)


def plt(X: Any, Y: Any, X_test: Any, k: int, folder: Path) -> Answer:
    """Train and predict with napkinXC's probabilistic label trees."""
    from napkinxc.models import PLT

    model, labels = PLT(str(folder / "model"), threads=THREADS, seed=1), [row.tolist() for row in rows(Y)]
    began = time.perf_counter()
    model.fit(X, labels)
    train_s = time.perf_counter() - began
    model.load()
    ready = time.perf_counter()
    return model.predict(X_test, top_k=k), train_s, time.perf_counter() - ready


def xr_linear(X: Any, Y: Any, X_test: Any, k: int, folder: Path) -> Answer:
    """Train and predict with PECOS' defaults."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    began = time.perf_counter()
    embedding = LabelEmbeddingFactory.create(Y, X, method="pifa")
    clusters = Indexer.gen(embedding, indexer_type="hierarchicalkmeans", threads=THREADS)
    model = XLinearModel.train(X, Y, C=clusters, threads=THREADS)
    train_s = time.perf_counter() - began
    model.save(str(folder / "model"))
    model = XLinearModel.load(str(folder / "model"), is_predict_only=True)
    ready = time.perf_counter()
    scores = model.predict(X_test, only_topk=k, threads=THREADS)
    return best(scores, k), train_s, time.perf_counter() - ready


def knn(X: Any, Y: Any, X_test: Any, k: int, folder: Path) -> Answer:
    """Let the nearest training samples, of all, vote for their labels, each by its cosine; values are searched in bfloat16."""
    import torch

    from mach.data import CSR
    from mach.decoding.rerank import Nearest

    sp.save_npz(folder / "X.npz", X, compressed=False)
    sp.save_npz(folder / "Y.npz", Y, compressed=False)
    turned, found = X.tocsc(), []
    bits = torch.from_numpy(turned.data).bfloat16().view(torch.uint16).numpy()
    index = Nearest(turned.indptr.astype(np.int64), turned.indices.astype(np.int32), bits, X.shape[0])
    began = time.perf_counter()
    for low in range(0, X_test.shape[0], 4096):
        queries = X_test[low : low + 4096]
        near = index.find(CSR.from_scipy(queries), NEIGHBOURS, entries=X.nnz)
        sample, nth = np.nonzero(near >= 0)
        cosines = queries[sample].multiply(X[near[sample, nth]]).sum(axis=1)
        votes = sp.csr_matrix((np.asarray(cosines).ravel(), (sample, near[sample, nth])), (len(near), X.shape[0]))
        found += best((votes @ Y).tocsr(), k)
    return found, 0.0, time.perf_counter() - began


METHODS = {
    "parabel": (parabel, "Parabel (omikuji)"),
    "bonsai": (bonsai, "Bonsai (omikuji)"),
    "plt": (plt, "PLT (napkinXC)"),
    "xr-linear": (xr_linear, "XR-Linear (PECOS)"),
    "knn": (knn, "kNN-20, cosine"),
}


def measure(method: str, data: Path, run: int, known: list[set[int]]) -> str:
    """Train, predict and measure; give a line of the table."""
    (X, Y), (X_test, Y_test) = read(data / "train.txt"), read(data / "test.txt")
    train, name = METHODS[method]
    known = known or [set()] * X_test.shape[0]
    with tempfile.TemporaryDirectory() as folder:
        found, train_s, predict_s = train(X, Y, X_test, TOP_K + max(map(len, known)), Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    labels = np.full((X_test.shape[0], TOP_K), -1, np.int64)
    for i, (row, out) in enumerate(zip(found, known, strict=True)):
        kept = [label for label in row if label not in out][:TOP_K]
        labels[i, : len(kept)] = kept
    counts = np.bincount(Y.indices, minlength=Y.shape[1])
    evaluator = Evaluator(Y.shape[1], propensities=propensities(counts, X.shape[0]))
    evaluator.update(labels, None, Y_test)
    metrics = evaluator.result()
    figures = [" / ".join(f"{100 * metrics[m]:.2f}" for m in group) for group in METRICS]
    costs = [f"{train_s:.1f}", "", f"{size / 1e6:.0f}", f"{1e3 * predict_s / X_test.shape[0]:.3f}", ""]
    return f"| {' | '.join([data.name, name, str(run), *figures, *costs])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--exclude", type=Path)
    args = parser.parse_args()
    known = [set(map(int, line.split())) for line in args.exclude.read_text().splitlines()] if args.exclude else []
    for data in args.data:
        for run in range(args.runs):
            print(measure(args.method, data, run, known), flush=True)


if __name__ == "__main__":
    main()
