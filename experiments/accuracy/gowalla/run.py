"""How well does the ensemble find places that a user has yet to visit? Known ones are features, labels of train, and excluded.

    python experiments/accuracy/gowalla/run.py DATA --out runs/gowalla

DATA is a folder of XC-repository text whose features are labels, too, such as gowalla. Prints Recall@20 and NDCG@20 of the test
split for a few settings, none of them chosen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import mach
from mach.compare.rows import this_machine
from mach.data import take
from mach.metrics import ndcg_at_k, recall_at_k

K = 20
SETTINGS = ({}, {"loss": "softmax"}, {"loss": "softmax", "dropout": 0.5})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dataset = mach.prepare(args.data, args.out / f"{args.data.name}.data")
    test = dataset.split("test")
    known = np.split(np.asarray(test.features.indices), test.features.indptr[1:-1])
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for settings in SETTINGS:
        began = time.perf_counter()
        model = mach.train(mach.Config(rerank=0, **settings), dataset)
        parts = np.array_split(np.arange(test.n_samples), -(-test.n_samples // 2048))
        found = [model.predict_topk(take(test.features, rows), K, exclude=[known[row] for row in rows]).labels for rows in parts]
        labels, seconds = np.concatenate(found), time.perf_counter() - began
        recall, ndcg = recall_at_k(labels, test.labels, K), ndcg_at_k(labels, test.labels, K)
        print(f"{settings or 'defaults'}: Recall@{K} {recall:.4f}, NDCG@{K} {ndcg:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
