"""What makes a run: `mach train` and `mach rerank`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mach.cli.arguments import Command, add_machine, plain_value
from mach.cli.datasets import open_or_prepare
from mach.cli.printing import is_first, repetitions_text, say
from mach.config import AUTO, Config, load_config

RERANK_SETTINGS = ("rerank", "rerank_cost", "rerank_weight")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a data set, or a folder of XC-repository text files")
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--config", help="a TOML file of settings; flags go before it")
    _add_settings(parser)
    add_machine(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints of a run that was stopped")
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints (default 120)")
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=40.0,
        metavar="S",
        help="under torchrun: time that a step waits for a rank (default 40)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events into the run folder")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of `Config`; what is not given keeps the file's value or the default."""
    group = parser.add_argument_group("settings")
    hints = get_type_hints(Config)
    for f in fields(Config):
        flag, hint, text = "--" + f.name.replace("_", "-"), hints[f.name], f"{f.metadata['help']} (default {f.default})"
        options: dict[str, Any] = {"default": None, "help": text.replace("%", "%%"), "dest": f.name}
        if f.name == "repetitions":
            group.add_argument(flag, metavar="R|a-b", **{**options, "help": options["help"] + ", or their numbers: 0-7"})
        elif hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(hint) is Literal:
            group.add_argument(flag, choices=get_args(hint), **options)
        else:
            group.add_argument(flag, type=plain_value, metavar=f.name.upper()[:1], **options)


def _train(args: argparse.Namespace) -> None:
    given = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    base = load_config(args.config) if args.config else Config()
    numbers = None
    if (text := given.get("repetitions", AUTO)) != AUTO:
        from mach.store.folder import parse_repetitions

        numbers = parse_repetitions(text)
        given["repetitions"] = max(numbers) + 1
    config = base.replace(**given)
    from mach.parallel import train
    from mach.store import Run

    dataset = open_or_prepare(args.data, args.out)
    train(
        config,
        dataset,
        args.out,
        repetitions=numbers,
        device=args.device,
        workers=args.workers,
        resume=args.resume,
        checkpoint_s=args.checkpoint_seconds,
        tensorboard=args.tensorboard,
        progress=True,
        timeout_s=args.rank_timeout,
    )
    if not is_first():
        return
    records = Run.open(args.out).records().values()
    total = sum(r["parameters"] for r in records), sum(r["bytes"] for r in records), sum(r["train_s"] for r in records)
    say(
        f"{args.out}: {repetitions_text(len(records))}, {total[0]:,} parameters, {total[1]:,} bytes, {total[2]:.1f} s of training"
    )
    _say_reranker(args.out)


TRAIN = Command("train", "Train an ensemble, or some of its repetitions, or the full head.", _train_arguments, _train)


def _rerank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder whose repetitions are all there")
    parser.add_argument("data", help="the data set that it was trained on")
    for name in RERANK_SETTINGS:
        text = next(f.metadata["help"] for f in fields(Config) if f.name == name)
        parser.add_argument("--" + name.replace("_", "-"), type=plain_value, metavar="X", help=f"{text} (default: the run's)")
    add_machine(parser)


def _rerank(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.parallel.rerank import rerank

    wanted = {name: value for name in RERANK_SETTINGS if (value := getattr(args, name)) is not None}
    rerank(args.model, Dataset.open(args.data), settings=wanted, device=args.device, workers=args.workers, progress=True)
    _say_reranker(args.model)


RERANK = Command(
    "rerank", "Fit the second stage of a trained ensemble, which orders the first labels anew.", _rerank_arguments, _rerank
)


def _say_reranker(run: str) -> None:
    """Say what the second stage of a run is, if it has one."""
    from mach.inspect.show import show_reranker
    from mach.store.reranker import reranker_record

    if (record := reranker_record(Path(run))) is not None:
        say(f"{run}: {show_reranker(record)}")
