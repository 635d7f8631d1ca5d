"""How does accuracy depend on R and B? Ensembles of about equal head parameters, R B = the same, against the full head.

    python experiments/repetitions/run.py DATA --out runs/repetitions [--outputs 8192] [--epochs 4]

DATA is a folder of XC-repository text. Every ensemble is also decoded with its first 1, 2, 4, ... repetitions. Prints Markdown
tables and draws repetitions.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

import mach
from mach.compare.rows import Row, this_machine
from mach.compare.run import Named, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--outputs", type=int, default=8192, help="R B of every ensemble")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    dataset = mach.prepare(args.data, args.out / "data")
    base = mach.Config(epochs=args.epochs, hidden=args.hidden)
    sizes = [(R, args.outputs // R) for R in (2, 4, 8, 16) if args.outputs // R <= dataset.n_labels]
    named = [Named(f"R={R} B={B}", base.replace(repetitions=R, buckets=B)) for R, B in sizes]
    rows = compare(dataset, args.out, [*named, Named("full", base.replace(table="identity", rerank=0))])
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print(f"\n{args.data.name}, R B = {args.outputs}, D = {args.hidden}, {args.epochs} epochs; K = {dataset.n_labels}\n")
    print("| head | outputs | P@1 | P@3 | P@5 | R@100 | train s |\n|---|---|---|---|---|---|---|")
    for row in rows:
        outputs = row.config["buckets"] * row.config["repetitions"]
        m = [f"{100 * row.metrics[key]:.2f}" for key in ("P@1", "P@3", "P@5", "R@100")]
        print(f"| {row.name} | {outputs:,} | {' | '.join(m)} | {row.train_s:.0f} |")
    print("\nP@1 / P@5 when only the first repetitions are decoded with\n")
    numbers = sorted({r for row in rows for r, _ in row.by_repetitions})
    print(f"| head | {' | '.join(map(str, numbers))} |\n|---{'|---' * len(numbers)}|")
    for row in rows:
        if row.by_repetitions:
            found = {r: f"{100 * m['P@1']:.2f} / {100 * m['P@5']:.2f}" for r, m in row.by_repetitions}
            print(f"| {row.name} | {' | '.join(found.get(n, '') for n in numbers)} |")
    draw(rows, args.out / "repetitions.svg")


def draw(rows: list[Row], path: Path) -> None:
    """Draw P@1 and P@5 against the repetitions decoded with; the full head as a line."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for panel, key in zip(panels, ("P@1", "P@5"), strict=True):
        for row in rows:
            if row.by_repetitions:
                numbers, metrics = zip(*row.by_repetitions, strict=True)
                panel.plot(numbers, [100 * m[key] for m in metrics], marker="o", label=row.name)
            else:
                panel.axhline(100 * row.metrics[key], color="black", linestyle="--", label=row.name)
        panel.set(xscale="log", xlabel="repetitions decoded with", ylabel=f"{key}, %")
        panel.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
        panel.minorticks_off()
    panels[0].legend(frameon=False)
    figure.savefig(path)
    print(f"\ndrawn: {path}")


if __name__ == "__main__":
    main()
