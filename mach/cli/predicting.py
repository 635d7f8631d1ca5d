"""What asks a run: `mach predict`, `mach calibrate` and `mach ask`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mach.cli.arguments import Command, add_asking, add_choice, add_top_k, how_asked, numbers
from mach.cli.printing import complain, say, say_json
from mach.draw import progress_bar

PARTLY = "the calibration was fitted where all labels may be found; with --restrict or --exclude its probabilities may be off"


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder")
    parser.add_argument("data", help="a data set")
    parser.add_argument("--split", default="test")
    add_top_k(parser)
    parser.add_argument("--out", required=True, help="the Parquet file: columns row, labels, scores")
    parser.add_argument("--workers", type=int, help="processes (default: one a GPU, or one)")
    parser.add_argument("--no-rerank", action="store_true", help="without the run's re-ranker: what decoding alone finds")
    add_choice(parser)
    add_asking(parser)
    group = parser.add_argument_group(
        "of a calibrated run", "fitted where all labels may be found: with --restrict or --exclude they may be off"
    )
    group.add_argument("--probabilities", action="store_true", help="also a column of them")
    group.add_argument("--precision", type=float, metavar="P", help="keep only labels above the threshold for this precision")
    group.add_argument("--min-probability", type=float, metavar="P", help="keep only labels at least this probable")


def _predict(args: argparse.Namespace) -> None:
    from mach.parallel.offline import predict

    is_trusted = args.probabilities or args.precision is not None or args.min_probability is not None
    if is_trusted and (args.restrict or args.exclude):
        complain(f"mach predict: {PARTLY}")
    with progress_bar("predicting") as progress:
        n_rows = predict(
            args.model,
            args.data,
            args.out,
            split=args.split,
            k=args.top_k,
            rerank=not args.no_rerank,
            restrict=args.restrict,
            exclude=args.exclude,
            probabilities=args.probabilities,
            precision=args.precision,
            min_probability=args.min_probability,
            workers=args.workers,
            progress=progress,
            **how_asked(args),
        )
    say(f"{args.out}: {n_rows:,} rows")


PREDICT = Command("predict", "Write the best labels of a split's samples to a Parquet file.", _predict_arguments, _predict)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder; calibration.json is written into it")
    parser.add_argument("data", help="a data set")
    parser.add_argument("--split", default="dev", help="dev, test, or validation: what training held out (default dev)")
    add_top_k(parser)
    parser.add_argument("--precision", type=float, nargs="+", metavar="P", help="find thresholds for these (default 0.5 to 0.99)")
    parser.add_argument("--plot", metavar="FILE", help="draw a reliability diagram, too: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true")
    add_asking(parser)


def _calibrate(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.inspect.plot import check_ending
    from mach.inspect.reliability import plot_calibration, show_calibration
    from mach.parallel.calibrating import PRECISIONS, calibrate
    from mach.store.calibration import FILE

    if args.plot:
        check_ending(args.plot)
    with progress_bar("predicting") as progress:
        found = calibrate(
            args.model,
            Dataset.open(args.data),
            split=args.split,
            k=args.top_k,
            precisions=args.precision or PRECISIONS,
            progress=progress,
            **how_asked(args),
        )
    if args.plot:
        plot_calibration(found, args.plot)
    if args.json:
        return say_json({"of": found.of, "measured": found.measured, "thresholds": list(map(asdict, found.thresholds))})
    for line in show_calibration(found):
        say(line)
    say(f"kept: {Path(args.model) / FILE}")


CALIBRATE = Command(
    "calibrate",
    "Fit a map from a run's scores to probabilities, and thresholds, on held-out samples.",
    _calibrate_arguments,
    _calibrate,
)


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder of a model trained on text")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    add_asking(parser)


def _ask(args: argparse.Namespace) -> None:
    from mach.inspect.ask import ask, json_lines, text_lines
    from mach.store import Run

    model = Run.open(args.model).load(numbers(args.repetitions), skip_broken=args.skip_broken, device=args.device)
    found = ask(args.model, model, args.text, args.top_k, estimator=args.estimator, as_asked=args.json)
    if found.doubt:
        complain(f"mach ask: {found.doubt}")
    for line in (json_lines if args.json else text_lines)(found, model, args.text):
        say(line)


ASK = Command("ask", "Give the best labels of texts.", _ask_arguments, _ask)
