"""How accurate is the ensemble, for what it costs? With and without its second stage, and the full head of the same encoder.

    python experiments/accuracy/table/run.py DATA [DATA ...] --out runs/accuracy [--heads ours,published,full,quarter]

DATA are folders of XC-repository text with train.txt, test.txt and perhaps dev.txt. "ours" is `mach train` without flags;
"published" is MACH as its authors have it (random tables, no second stage), "full" the full head, "quarter" ours with a quarter
of the full head's outputs in all. Prints a Markdown table of the test split. A second call trains only what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mach
from mach.compare.rows import Row, this_machine
from mach.compare.run import Named, compare

METRICS = (("P@1", "P@3", "P@5"), ("PSP@1", "PSP@3", "PSP@5"), ("R@10",), ("R@100",))


def configurations(n_labels: int, seed: int) -> dict[str, mach.Config]:
    ours = mach.Config(seed=seed)
    return {
        "ours": ours,
        "published": ours.replace(rerank=0),
        "full": ours.replace(table="identity"),
        "quarter": ours.replace(buckets=max(2, n_labels // 4 // ours.repetitions)),
    }


def line(name: str, row: Row, seed: int) -> str:
    figures = [" / ".join(f"{100 * row.metrics[m]:.2f}" if m in row.metrics else "-" for m in metrics) for metrics in METRICS]
    cost = [
        f"{row.train_s:.0f}",
        f"{row.parameters / 1e6:.1f}",
        f"{row.bytes / 1e6:.0f}",
        f"{row.predict_ms:.3f}",
        f"{row.decode_ms:.3f}",
    ]
    return f"| {' | '.join([name, row.name, str(seed), *figures, *cost])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", default="ours,published,full,quarter")
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    head = "data | head | seed | P@1 / P@3 / P@5 | PSP@1 / 3 / 5 | R@10 | R@100 | train s | parameters, million | MB | predict ms"
    print(f"| {head} | decode ms |")
    print("|" + "---|" * 12)
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        for seed in map(int, args.seeds.split(",")):
            known = configurations(dataset.n_labels, seed)
            named = [Named(name, known[name]) for name in args.heads.split(",")]
            for row in compare(dataset, args.out / f"{source.name}-{seed}", named):
                print(line(source.name, row, seed), flush=True)


if __name__ == "__main__":
    main()
