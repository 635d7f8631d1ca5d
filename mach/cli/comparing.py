"""What measures: `mach evaluate` and `mach compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mach.cli.arguments import Command, add_machine
from mach.cli.datasets import describe
from mach.cli.printing import say, say_json


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", help="what `mach predict` wrote")
    parser.add_argument("data", help="the data set")
    parser.add_argument("--split", default="test")
    parser.add_argument("--propensity", default="other", help="A and B of propensities: amazon, wikipedia or other")
    parser.add_argument("--threshold", type=float, help="also F1, counting labels of at least this score as predicted")
    parser.add_argument("--json", action="store_true")


def _evaluate(args: argparse.Namespace) -> None:
    from mach.compare.evaluate import evaluate
    from mach.data import Dataset

    dataset = Dataset.open(args.data)
    found = evaluate(args.predictions, dataset, args.split, propensity=args.propensity, threshold=args.threshold)
    if args.json:
        return say_json(found)
    say(f"{args.predictions}: {dataset.split(args.split).n_samples:,} samples, in percent")
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in found))
    for name in sorted(found, key=lambda name: kinds.index(name.partition("@")[0])):  # k rises already
        say(f"{name:>10} {100 * found[name]:6.2f}")


EVALUATE = Command("evaluate", "Measure predictions against the truth.", _evaluate_arguments, _evaluate)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a data set")
    parser.add_argument("--out", required=True, help="the folder of the runs, report.html and results.json")
    parser.add_argument("--config", required=True, help="TOML: settings under [base], then [[configurations]] with a name each")
    add_machine(parser)


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from mach.compare.report import render_parts, render_table
    from mach.compare.run import compare, read_configurations
    from mach.data import Dataset

    configurations = read_configurations(args.config)
    dataset = Dataset.open(args.data)
    say(describe(dataset))
    rows = compare(dataset, args.out, configurations, device=args.device, workers=args.workers, progress=True, say=say)
    console = Console(width=max(110, Console().width))
    console.print(render_table(rows))
    if (parts := render_parts(rows)) is not None:
        console.print(parts)
    say(f"report: {Path(args.out) / 'report.html'}")


COMPARE = Command(
    "compare", "Train and measure several configurations on one data set; write a report.", _compare_arguments, _compare
)
