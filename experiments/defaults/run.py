"""Does one set of defaults serve every data set? The hashed ensemble and the full head on each, no flag but the table.

    python experiments/defaults/run.py --out runs/defaults DATA [DATA ...] [--seed 0]

DATA are folders of XC-repository text (train.txt, test.txt). Prints a Markdown table: accuracy, seconds, parameters, bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mach
from mach.compare.rows import this_machine
from mach.compare.run import Named, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print("| data | head | P@1 / P@3 / P@5 | PSP@1 | R@100 | train s | predict ms | decode ms | parameters | MB | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        hashed = mach.Config(seed=args.seed)
        named = [Named("hashed", hashed), Named("full", hashed.replace(table="identity"))]
        for row in compare(dataset, args.out / f"{source.name}-{args.seed}", named):
            m = {key: f"{100 * value:.2f}" for key, value in row.metrics.items()}
            cells = [
                source.name, row.name, f"{m['P@1']} / {m['P@3']} / {m['P@5']}", m["PSP@1"], m["R@100"], f"{row.train_s:.0f}",
                f"{row.predict_ms:.3f}", f"{row.decode_ms:.3f}", f"{row.parameters / 1e6:.1f} M", f"{row.bytes / 1e6:.0f}",
                f"{row.peak_bytes / 1e6:.0f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
