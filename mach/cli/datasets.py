"""Data sets: `mach prepare`, `mach split`, and what other commands need of a data set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mach.cli.arguments import Command
from mach.cli.printing import say
from mach.draw import progress_bar
from mach.errors import DataError

if TYPE_CHECKING:
    from mach.data import Dataset

TOLD = 0.01  # of a split's samples that are in train
ADVISED = 0.1  # of a split's samples that are in train with other labels


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the train split's file, or a folder of train.*, test.* and dev.*")
    parser.add_argument("--out", required=True, help="the data set's folder")
    parser.add_argument("--test", help="the test split's file")
    parser.add_argument("--dev", help="the dev split's file")
    parser.add_argument("--format", default="auto", choices=("auto", "xc", "svmlight", "npz", "parquet", "tsv"))
    parser.add_argument("--max-features", type=int, help="keep the most frequent word and character n-grams of text")


def _prepare(args: argparse.Namespace) -> None:
    from mach.data import prepare

    with progress_bar("preparing") as progress:
        dataset = prepare(
            args.source,
            args.out,
            test=args.test,
            dev=args.dev,
            format=args.format,
            max_features=args.max_features,
            progress=progress,
        )
    say(describe(dataset))
    for line in twins_of(dataset):
        say(line)


PREPARE = Command(
    "prepare", "Make a data set of XC-repository text, svmlight, npz, Parquet or TSV files.", _prepare_arguments, _prepare
)


def _split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a data set without a dev split")
    parser.add_argument("--out", required=True, help="the new data set's folder")
    parser.add_argument("--share", type=float, default=0.1, help="of the training samples (default 0.1)")
    parser.add_argument(
        "--by",
        default="samples",
        choices=("samples", "alike"),
        help="samples: at random; alike: whole groups of like features, for when what comes is new (default samples)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")


def _split(args: argparse.Namespace) -> None:
    from mach.data import Dataset, split_dev

    with progress_bar("splitting") as progress:
        dataset = split_dev(Dataset.open(args.data), args.out, share=args.share, by=args.by, seed=args.seed, progress=progress)
    say(describe(dataset))


SPLIT = Command("split", "Hold a part of train out as the dev split, on which settings are chosen.", _split_arguments, _split)


def describe(dataset: Dataset) -> str:
    """Say in a line what a data set holds."""
    splits = ", ".join(f"{name} {dataset.split(name).n_samples:,}" for name in dataset.split_names)
    return f"{dataset.path}: {splits} samples, {dataset.n_features:,} features, {dataset.n_labels:,} labels"


def twins_of(dataset: Dataset) -> list[str]:
    """Say which splits have many samples that are in train, too: a line each."""
    from mach.data import count_twins

    train, lines = dataset.split("train"), []
    for split in (dataset.split(name) for name in dataset.split_names if name != "train"):
        found = count_twins(train, split)
        if found.n >= TOLD * split.n_samples > 0:
            line = (
                f"{split.name}: {found.n:,} of {split.n_samples:,} samples ({found.n / split.n_samples:.0%}) have the very "
                f"features of one in train; {found.n_strange:,} of these share no label with it"
            )
            is_known = found.n_strange >= ADVISED * split.n_samples
            lines.append(line + "; if known answers were left out, leave them out: mach predict --exclude" * is_known)
    return lines


def open_or_prepare(path: str, out: str) -> Dataset:
    """Open a data set, or prepare a folder of text files once, beside the run."""
    from mach.data import Dataset, prepare

    if (Path(path) / "manifest.json").exists() or not any(Path(path).glob("train.*")):
        return Dataset.open(path)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("HOROVOD_SIZE", "1"))) > 1:
        raise DataError(
            f"{path}: is not a data set yet, and several processes would prepare it at once; run `mach prepare` first"
        )
    run = Path(out).resolve()
    beside = run.with_name(run.name + ".data")
    with progress_bar(f"preparing {beside}") as progress:
        return prepare(path, beside, progress=progress)
