"""Prediction in pieces, on machines that share a folder at most: `mach score` and `mach decode`."""

from __future__ import annotations

import argparse

from mach.cli.arguments import Command, add_choice, add_estimator, add_top_k, numbers
from mach.cli.printing import say
from mach.draw import progress_bar


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder")
    parser.add_argument("data", help="a data set")
    parser.add_argument("--split", default="test")
    parser.add_argument("--repetition", type=int, required=True, metavar="r", help="its number")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="which of n shards, from 0/n on (default 0/1: all)")
    parser.add_argument("--top-buckets", type=int, metavar="m", help="keep each sample's m best buckets and what bounds the rest")
    parser.add_argument("--out", required=True, help="a folder, perhaps of other scores")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i")


def _score(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.store import Run
    from mach.store.scores import parse_shard, write_scores

    with progress_bar("scoring") as progress:
        piece = write_scores(
            Run.open(args.model),
            Dataset.open(args.data),
            args.out,
            split=args.split,
            repetition=args.repetition,
            shard=parse_shard(args.shard),
            top_buckets=args.top_buckets,
            device=args.device,
            progress=progress,
        )
    start, stop = piece.record["rows"]
    n_bytes = sum(known["bytes"] for known in piece.record["files"].values())
    say(f"{args.out}: {piece.name}, {stop - start:,} rows, {n_bytes:,} bytes")


SCORE = Command(
    "score", "Write what one repetition says of one shard of a split's samples, for `mach decode`.", _score_arguments, _score
)


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", metavar="FOLDER", help="what `mach score` wrote")
    add_top_k(parser)
    parser.add_argument("--out", required=True, help="the Parquet file: columns row, labels, scores, and perhaps certified")
    add_choice(parser)
    add_estimator(parser)
    parser.add_argument("--redo", nargs=2, metavar=("RUN", "DATA"), help="compute again, in full, rows that are not certified")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i, for --redo")


def _decode(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.store import Run
    from mach.store.decode import decode

    with progress_bar("decoding") as progress:
        n_rows, n_uncertified = decode(
            args.scores,
            args.out,
            k=args.top_k,
            estimator=args.estimator,
            repetitions=numbers(args.repetitions),
            restrict=args.restrict,
            exclude=args.exclude,
            redo=(Run.open(args.redo[0]), Dataset.open(args.redo[1])) if args.redo else None,
            device=args.device,
            progress=progress,
        )
    unsure = f", {n_uncertified:,} of them not certified; --redo RUN DATA computes those in full" if n_uncertified else ""
    say(f"{args.out}: {n_rows:,} rows{unsure}")


DECODE = Command("decode", "Write the best labels of a split's samples from what `mach score` wrote.", _decode_arguments, _decode)
