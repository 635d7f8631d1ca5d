"""What looks at a folder: `mach inspect` and `mach verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mach.cli.arguments import Command
from mach.cli.printing import repetitions_text, say, say_json
from mach.errors import ModelError


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder")
    parser.add_argument("--plot", metavar="FILE", help="draw its training, too: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true")


def _inspect(args: argparse.Namespace) -> None:
    from mach.inspect.history import histories
    from mach.inspect.plot import plot
    from mach.inspect.reliability import summary
    from mach.inspect.show import show, show_parts, show_reranker, size_text
    from mach.store import Run
    from mach.store.calibration import has_calibration, read_calibration
    from mach.store.reranker import reranker_record

    run = Run.open(args.model)
    records, problems, found = run.records(), run.problems(), histories(run.path)
    calibration = read_calibration(run.path) if has_calibration(run.path) else None
    if args.json:
        groups = {history.name: history.to_dict() for history in found}
        told = {"manifest": run.manifest, "repetitions": records, "problems": problems, "groups": groups}
        probabilities = None if calibration is None else {"of": calibration.of, "measured": calibration.measured}
        return say_json({**told, "reranker": reranker_record(run.path), "calibration": probabilities})
    sizes, config = run.sizes, run.config
    counts = f"{sizes.n_labels:,} labels, {sizes.n_buckets:,} buckets, width {sizes.hidden:,}, {sizes.n_features:,} features"
    say(f"{args.model}: {config.table} table, {counts}")
    say(", ".join(f"{name}={value}" for name, value in config.to_dict().items()))
    for r in sorted({*records, *problems}):
        if r in problems:
            say(f"repetition {r} {problems[r]}")
        else:
            facts = records[r]
            peak = f", {size_text(facts['peak_bytes'])} of memory at most" if "peak_bytes" in facts else ""
            learnt = ", similar labels together" if facts.get("is_grouped") else ""
            say(f"repetition {r}: {facts['parameters']:,} parameters, {facts['train_s']:.1f} s of training{peak}{learnt}")
            if not found:  # without logs, what the repetition itself tells
                for line in show_parts(facts.get("parts_s", {})):
                    say(line)
    if (second := reranker_record(run.path)) is not None:
        say(show_reranker(second))
    if calibration is not None:
        say(summary(calibration))
    for history in found:
        for line in show(history):
            say(line)
    if args.plot:
        plot(found, args.plot)
        say(f"plot: {args.plot}")


INSPECT = Command("inspect", "Show what a run folder holds, and how its training went.", _inspect_arguments, _inspect)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder or a data set")


def _verify(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.store import Run
    from mach.store.calibration import trouble

    if "splits" in _manifest(args.model):
        Dataset.open(args.model).verify()
        return say(f"{args.model}: every file matches its checksum")
    run = Run.open(args.model)
    problems = run.verify() + ([broken] if (broken := trouble(args.model)) else [])
    if problems:
        raise ModelError(f"{args.model}: {'; '.join(problems)}")
    say(f"{args.model}: {repetitions_text(len(run.finished()))}, every file matches its checksum")


VERIFY = Command("verify", "Check every byte of a run folder or data set against its checksums.", _verify_arguments, _verify)


def _manifest(folder: str) -> Any:
    """Give a folder's manifest, or nothing where there is none to read: what opens the folder says so."""
    from mach.files import read_json

    try:
        return read_json(Path(folder) / "manifest.json")
    except (OSError, ValueError):
        return {}
