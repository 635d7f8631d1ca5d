"""Seconds of training until a P@1 is reached: the hashed ensemble, trained for 1, 2, 3, ... epochs, each a run of its own.

    python experiments/speed/race.py DATA [DATA ...] --out runs/race [--epochs 1,2,3,4,6] [--seed 0] [--set hidden=256]

DATA are folders of XC-repository text. The schedule is fitted to the number of epochs, as it is for anyone who trains so long.
Compare with `accuracy/table/peers.py` on the same machine, one after the other. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mach
from mach.compare.rows import this_machine
from mach.compare.run import Named, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", default="1,2,3,4,6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings that are not the default")
    args = parser.parse_args()
    changes = dict(change.split("=", 1) for change in args.set)
    plain = {key: json.loads(value) if value[0].isdigit() else value for key, value in changes.items()}
    name = "-".join(["run", str(args.seed), *args.set]).replace("=", "")
    print(", ".join(f"{key} {value}" for key, value in this_machine().items()))
    print("| data | epochs | train s | P@1 | P@3 | P@5 | predict ms |\n|---|---|---|---|---|---|---|")
    for source in args.data:
        dataset = mach.prepare(source, args.out / source.name / "data")
        base = mach.Config(seed=args.seed).replace(**plain)
        named = [Named(f"e{n}", base.replace(epochs=int(n))) for n in args.epochs.split(",")]
        for row, n in zip(compare(dataset, args.out / source.name / name, named), args.epochs.split(","), strict=True):
            figures = [f"{100 * row.metrics[f'P@{k}']:.2f}" for k in (1, 3, 5)]
            print(f"| {source.name} | {n} | {row.train_s:.1f} | {' | '.join(figures)} | {row.predict_ms:.3f} |", flush=True)


if __name__ == "__main__":
    main()
