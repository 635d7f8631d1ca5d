"""Which settings of the ensemble are better than the defaults? One changed at a time, judged with and without the second stage.

    python experiments/accuracy/recipe/run.py DATA [DATA ...] --out runs/recipe [--seeds 0] [--only epochs=3,repetitions=4 ...]

DATA are folders of XC-repository text. Judged on dev.txt if there is one, else on a tenth of train.txt that is held out; test
splits are not read. The re-ranker has its settings for sets without a dev split, so that what judges is not what chose. Prints a
Markdown table for each; a second call trains only what is left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import mach
from mach.compare.rows import this_machine
from mach.data import take, take_rows
from mach.decoding.rerank import DEFAULT_WEIGHT
from mach.parallel.rerank import DEFAULT_COST
from mach.store import Run
from mach.train.loop import held_out_rows

CHANGES = (
    "epochs=6,learning_rate=0.002,input_learning_rate=0.03", "epochs=3", "epochs=10", "repetitions=4", "repetitions=16",
    "dropout=0.1", "dropout=0.5", "hidden=256", "hidden=512", "hidden=1024", "layers=1", "batch_size=128", "loss=squared-hinge",
    "loss=softmax", "head_optimizer=rowwise-adam", "weight_decay=0.01", "normalize=false", "grouped=0.5",
)  # fmt: skip


def settings_of(change: str) -> dict[str, Any]:
    """Read settings as TOML writes them; a word stands for itself."""
    pairs = [each.split("=") for each in change.split(",") if each]
    return {name: value if value[0].isalpha() and value not in ("true", "false") else json.loads(value) for name, value in pairs}


def measure(dataset: mach.Dataset, out: Path, change: str, seed: int) -> str:
    has_dev = "dev" in dataset.split_names
    fixed = {"rerank_cost": DEFAULT_COST, "rerank_weight": DEFAULT_WEIGHT, "validation": 0.0 if has_dev else 0.1}
    config = mach.Config(seed=seed).replace(**fixed, **settings_of(change))
    path = out / (change.replace("=", "-").replace(",", "_") or "defaults")
    model = mach.train(config, dataset, path)
    judged = dataset.split("dev" if has_dev else "train")
    rows = np.arange(judged.n_samples) if has_dev else held_out_rows(config, dataset)
    features, truth = take(judged.features, rows), take_rows(judged.labels, rows)
    cells = []
    for each in (model, mach.load(path, rerank=False)):
        labels = np.concatenate(
            [each.predict_topk(take(features, some), 5).labels for some in np.array_split(np.arange(len(rows)), 8)]
        )
        cells.append(" / ".join(f"{100 * mach.precision_at_k(labels, truth, k):.2f}" for k in (1, 3, 5)))
    seconds = sum(record["train_s"] for record in Run.open(path).records().values())
    return f"| {change or 'defaults'} | {seed} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", nargs="+", default=list(CHANGES), metavar="NAME=VALUE,...")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        print(f"\n## {source.name}\n\n| changed | seed | both stages: P@1 / P@3 / P@5 | decoding alone | train s |")
        print("|" + "---|" * 5)
        for change in ("", *args.only):
            for seed in map(int, args.seeds.split(",")):
                print(measure(dataset, args.out / f"{source.name}-{seed}", change, seed), flush=True)


if __name__ == "__main__":
    main()
