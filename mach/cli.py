"""The command line: parse, call one function, print. Heavy modules are imported by the command that needs them.

Errors that a user can mend are one line on standard error, and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mach.config import Config, Estimator, load_config
from mach.draw import progress_bar
from mach.errors import ConfigError, DataError, MachError, ModelError, Stopped

if TYPE_CHECKING:
    from mach.data import Dataset
    from mach.hashing.bounds import Cost, Plan
    from mach.parallel.forecast import Forecast, Rates

LINE_OF_CTRL_C = "\n"  # a terminal writes ^C and stays on its line
PARTLY = "the calibration was fitted where all labels may be found; with --restrict or --exclude its probabilities may be off"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit status."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # torch's idle threads would keep our kernels' threads off the cores for ms
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except MachError as error:
        print(f"mach {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Stopped as stop:
        how = "--resume" if args.command == "train" else "the same command"
        if _is_first():
            print(f"{LINE_OF_CTRL_C if stop.status else ''}mach {args.command}: {stop}; go on with {how}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print(f"{LINE_OF_CTRL_C}mach {args.command}: stopped; checkpoints and finished files are kept", file=sys.stderr)
        return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        _say(f"mach {version('mach')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mach", description="Classification over millions of labels: hashed ensembles and full heads.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    prepare = command("prepare", _prepare, "Make a data set of XC-repository text, svmlight, npz, Parquet or TSV files.")
    prepare.add_argument("source", help="the train split's file, or a folder of train.*, test.* and dev.*")
    prepare.add_argument("--out", required=True, help="the data set's folder")
    prepare.add_argument("--test", help="the test split's file")
    prepare.add_argument("--dev", help="the dev split's file")
    prepare.add_argument("--format", default="auto", choices=("auto", "xc", "svmlight", "npz", "parquet", "tsv"))
    prepare.add_argument("--max-features", type=int, help="keep the most frequent word and character n-grams of text")

    train = command("train", _train, "Train an ensemble, or some of its repetitions, or the full head.")
    train.add_argument("data", help="a data set, or a folder of XC-repository text files")
    train.add_argument("--out", required=True, help="the run folder")
    train.add_argument("--config", help="a TOML file of settings; flags go before it")
    _add_settings(train)
    _add_machine(train)
    train.add_argument("--resume", action="store_true", help="go on from the checkpoints of a run that was stopped")
    train.add_argument("--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints (default 120)")
    train.add_argument(
        "--rank-timeout",
        type=float,
        default=40.0,
        metavar="S",
        help="under torchrun: time that a step waits for a rank (default 40)",
    )
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard events into the run folder")

    rerank = command("rerank", _rerank, "Fit the second stage of a trained ensemble, which orders the first labels anew.")
    rerank.add_argument("model", metavar="RUN", help="a run folder whose repetitions are all there")
    rerank.add_argument("data", help="the data set that it was trained on")
    for name in ("rerank", "rerank_cost", "rerank_weight"):
        text = next(f.metadata["help"] for f in fields(Config) if f.name == name)
        rerank.add_argument("--" + name.replace("_", "-"), type=_plain_value, metavar="X", help=f"{text} (default: the run's)")
    _add_machine(rerank)

    predict = command("predict", _predict, "Write the best labels of a split's samples to a Parquet file.")
    predict.add_argument("model", metavar="RUN", help="a run folder")
    predict.add_argument("data", help="a data set")
    predict.add_argument("--split", default="test")
    predict.add_argument("--top-k", type=int, help="labels a sample (default 100, or all K if they are fewer)")
    predict.add_argument("--out", required=True, help="the Parquet file: columns row, labels, scores")
    predict.add_argument("--workers", type=int, help="processes (default: one a GPU, or one)")
    predict.add_argument("--no-rerank", action="store_true", help="without the run's re-ranker: what decoding alone finds")
    _add_choice(predict)
    _add_asking(predict)
    group = predict.add_argument_group(
        "of a calibrated run", "fitted where all labels may be found: with --restrict or --exclude they may be off"
    )
    group.add_argument("--probabilities", action="store_true", help="also a column of them")
    group.add_argument("--precision", type=float, metavar="P", help="keep only labels above the threshold for this precision")
    group.add_argument("--min-probability", type=float, metavar="P", help="keep only labels at least this probable")

    calibrate = command(
        "calibrate", _calibrate, "Fit a map from a run's scores to probabilities, and thresholds, on held-out samples."
    )
    calibrate.add_argument("model", metavar="RUN", help="a run folder; calibration.json is written into it")
    calibrate.add_argument("data", help="a data set")
    calibrate.add_argument("--split", default="dev", help="dev, test, or validation: what training held out (default dev)")
    calibrate.add_argument("--top-k", type=int, help="labels a sample (default 100, or all K if they are fewer)")
    calibrate.add_argument(
        "--precision", type=float, nargs="+", metavar="P", help="find thresholds for these (default 0.5 to 0.99)"
    )
    calibrate.add_argument("--plot", metavar="FILE", help="draw a reliability diagram, too: .png, .svg or .pdf")
    calibrate.add_argument("--json", action="store_true")
    _add_asking(calibrate)

    score = command("score", _score, "Write what one repetition says of one shard of a split's samples, for `mach decode`.")
    score.add_argument("model", metavar="RUN", help="a run folder")
    score.add_argument("data", help="a data set")
    score.add_argument("--split", default="test")
    score.add_argument("--repetition", type=int, required=True, metavar="r", help="its number")
    score.add_argument("--shard", default="0/1", metavar="i/n", help="which of n shards, from 0/n on (default 0/1: all)")
    score.add_argument("--top-buckets", type=int, metavar="m", help="keep each sample's m best buckets and what bounds the rest")
    score.add_argument("--out", required=True, help="a folder, perhaps of other scores")
    score.add_argument("--device", default="auto", help="auto, cpu or cuda:i")

    decode = command("decode", _decode, "Write the best labels of a split's samples from what `mach score` wrote.")
    decode.add_argument("scores", nargs="+", metavar="FOLDER", help="what `mach score` wrote")
    decode.add_argument("--top-k", type=int, help="labels a sample (default 100, or all K if they are fewer)")
    decode.add_argument("--out", required=True, help="the Parquet file: columns row, labels, scores, and perhaps certified")
    _add_choice(decode)
    decode.add_argument("--estimator", default="logits", choices=get_args(Estimator), help="how bucket scores make a label's")
    decode.add_argument("--repetitions", help="decode with some of the repetitions only: a count, or numbers such as 0-7")
    decode.add_argument("--redo", nargs=2, metavar=("RUN", "DATA"), help="compute again, in full, rows that are not certified")
    decode.add_argument("--device", default="auto", help="auto, cpu or cuda:i, for --redo")

    evaluate = command("evaluate", _evaluate, "Measure predictions against the truth.")
    evaluate.add_argument("predictions", help="what `mach predict` wrote")
    evaluate.add_argument("data", help="the data set")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--propensity", default="other", help="A and B of propensities: amazon, wikipedia or other")
    evaluate.add_argument("--threshold", type=float, help="also F1, counting labels of at least this score as predicted")
    evaluate.add_argument("--json", action="store_true")

    ask = command("ask", _ask, "Give the best labels of texts.")
    ask.add_argument("model", metavar="RUN", help="a run folder of a model trained on text")
    ask.add_argument("text", nargs="+")
    ask.add_argument("--top-k", type=int, default=5)
    ask.add_argument("--json", action="store_true")
    _add_asking(ask)

    compare = command("compare", _compare, "Train and measure several configurations on one data set; write a report.")
    compare.add_argument("data", help="a data set")
    compare.add_argument("--out", required=True, help="the folder of the runs, report.html and results.json")
    compare.add_argument("--config", required=True, help="TOML: settings under [base], then [[configurations]] with a name each")
    _add_machine(compare)

    inspect = command("inspect", _inspect, "Show what a run folder holds, and how its training went.")
    inspect.add_argument("model", metavar="RUN", help="a run folder")
    inspect.add_argument("--plot", metavar="FILE", help="draw its training, too: .png, .svg or .pdf")
    inspect.add_argument("--json", action="store_true")

    verify = command("verify", _verify, "Check every byte of a run folder or data set against its checksums.")
    verify.add_argument("model", metavar="RUN", help="a run folder or a data set")

    plan = command("plan", _plan, "Propose buckets, repetitions and width for a number of labels, and their cost.")
    plan.add_argument("--labels", type=_count, required=True, help="K, such as 3000000 or 3m")
    plan.add_argument("--features", type=_count, help="F, to count the encoders' input layers too")
    plan.add_argument("--active-features", type=_count, help="features that a sample has on average, where they are sparse")
    plan.add_argument("--samples", type=_count, help="N, training samples, to count the second stage, too; needs --features")
    plan.add_argument("--labels-a-sample", type=float, default=1.0, help="that a training sample has on average (default 1)")
    plan.add_argument("--memory", type=_count, help="for training, such as 8G or 8GiB")
    plan.add_argument("--hidden", type=int, default=512, help="D, the widest hidden vector to propose (default 512)")
    plan.add_argument("--delta", type=float, default=0.01, help="allowed chance that two labels share all buckets (default 0.01)")
    plan.add_argument("--batch-size", type=int, default=Config().batch_size, help="samples a step (default %(default)s)")
    plan.add_argument("--device", default="auto", help="auto, cpu or cuda:i: what memory and time are estimated for")
    plan.add_argument("--json", action="store_true")
    return parser


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
            group.add_argument(flag, type=_plain_value, metavar=f.name.upper()[:1], **options)


def _plain_value(text: str) -> Any:
    """Read a number as int or float where it is one; `Config` judges it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i (default auto: every GPU, or the CPU)")
    parser.add_argument("--workers", type=int, help="processes (default: one a GPU, or one)")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--estimator", default="logits", choices=get_args(Estimator), help="how bucket scores make a label's")
    parser.add_argument("--repetitions", help="decode with some of the repetitions only: a count, or numbers such as 0-7")
    parser.add_argument("--skip-broken", action="store_true", help="leave out repetitions that are missing or broken")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restrict", metavar="FILE", help="labels to choose among: an id or name a line, or an npy of ids")
    parser.add_argument(
        "--exclude", metavar="FILE", help="labels that each sample may not find: a line each, between commas, or a CSR npz"
    )


def _count(text: str) -> int:
    """Read `3000000`, `3m`, `8G`, `8GiB`."""
    number = text.lower().removesuffix("b")
    digits = number.rstrip("kmgti")
    try:
        return round(float(digits) * UNITS[number[len(digits) :]])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 3000000, 3m, 8G or 8GiB") from None


def _say(*texts: Any) -> None:
    print(*texts, flush=True)


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
    _say(_describe(dataset))


def _describe(dataset: Dataset) -> str:
    splits = ", ".join(f"{name} {dataset.split(name).n_samples:,}" for name in dataset.split_names)
    return f"{dataset.path}: {splits} samples, {dataset.n_features:,} features, {dataset.n_labels:,} labels"


def _dataset(path: str, out: str) -> Dataset:
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


def _train(args: argparse.Namespace) -> None:
    given = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    base = load_config(args.config) if args.config else Config()
    numbers = None
    if (text := given.pop("repetitions", None)) is not None:
        from mach.store.folder import parse_repetitions

        numbers = parse_repetitions(text)
        given["repetitions"] = max(numbers) + 1
    config = base.replace(**given)
    from mach.inspect.show import show_reranker
    from mach.parallel import train
    from mach.store import Run
    from mach.store.reranker import reranker_record

    dataset = _dataset(args.data, args.out)
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
    if not _is_first():
        return
    records = Run.open(args.out).records().values()
    total = sum(r["parameters"] for r in records), sum(r["bytes"] for r in records), sum(r["train_s"] for r in records)
    _say(f"{args.out}: {_repetitions(len(records))}, {total[0]:,} parameters, {total[1]:,} bytes, {total[2]:.1f} s of training")
    if (second := reranker_record(Path(args.out))) is not None:
        _say(f"{args.out}: {show_reranker(second)}")


def _rerank(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.inspect.show import show_reranker
    from mach.parallel.rerank import rerank
    from mach.store.reranker import reranker_record

    wanted = {name: value for name in ("rerank", "rerank_cost", "rerank_weight") if (value := getattr(args, name)) is not None}
    rerank(args.model, Dataset.open(args.data), settings=wanted, device=args.device, workers=args.workers, progress=True)
    _say(f"{args.model}: {show_reranker(reranker_record(Path(args.model)) or {})}")


def _is_first() -> bool:
    """Tell whether this process speaks for those that torchrun or horovodrun started with it."""
    return "0" == os.environ.get("RANK", os.environ.get("HOROVOD_RANK", "0"))


def _repetitions(n: int) -> str:
    return f"{n} repetition{'' if n == 1 else 's'}"


def _load(args: argparse.Namespace) -> Any:
    from mach.store import Run

    return Run.open(args.model).load(_numbers(args.repetitions), skip_broken=args.skip_broken, device=args.device)


def _numbers(text: str | None) -> list[int] | None:
    from mach.store.folder import parse_repetitions

    return parse_repetitions(text) if text else None


def _predict(args: argparse.Namespace) -> None:
    from mach.parallel.offline import predict

    is_trusted = args.probabilities or args.precision is not None or args.min_probability is not None
    if is_trusted and (args.restrict or args.exclude):
        print(f"mach predict: {PARTLY}", file=sys.stderr)
    with progress_bar("predicting") as progress:
        n_rows = predict(
            args.model,
            args.data,
            args.out,
            split=args.split,
            k=args.top_k,
            estimator=args.estimator,
            repetitions=_numbers(args.repetitions),
            skip_broken=args.skip_broken,
            rerank=not args.no_rerank,
            restrict=args.restrict,
            exclude=args.exclude,
            probabilities=args.probabilities,
            precision=args.precision,
            min_probability=args.min_probability,
            device=args.device,
            workers=args.workers,
            progress=progress,
        )
    _say(f"{args.out}: {n_rows:,} rows")


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
            estimator=args.estimator,
            repetitions=_numbers(args.repetitions),
            skip_broken=args.skip_broken,
            precisions=args.precision or PRECISIONS,
            device=args.device,
            progress=progress,
        )
    if args.plot:
        plot_calibration(found, args.plot)
    if args.json:
        return _say(json.dumps({"of": found.of, "measured": found.measured, "thresholds": list(map(asdict, found.thresholds))}))
    for line in show_calibration(found):
        _say(line)
    _say(f"kept: {Path(args.model) / FILE}")


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
    _say(f"{args.out}: {piece.name}, {stop - start:,} rows, {n_bytes:,} bytes")


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
            repetitions=_numbers(args.repetitions),
            restrict=args.restrict,
            exclude=args.exclude,
            redo=(Run.open(args.redo[0]), Dataset.open(args.redo[1])) if args.redo else None,
            device=args.device,
            progress=progress,
        )
    unsure = f", {n_uncertified:,} of them not certified; --redo RUN DATA computes those in full" if n_uncertified else ""
    _say(f"{args.out}: {n_rows:,} rows{unsure}")


def _evaluate(args: argparse.Namespace) -> None:
    from mach.compare.evaluate import evaluate
    from mach.data import Dataset

    dataset = Dataset.open(args.data)
    found = evaluate(args.predictions, dataset, args.split, propensity=args.propensity, threshold=args.threshold)
    if args.json:
        return _say(json.dumps(found))
    _say(f"{args.predictions}: {dataset.split(args.split).n_samples:,} samples, in percent")
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in found))
    for name in sorted(found, key=lambda name: kinds.index(name.partition("@")[0])):  # k rises already
        _say(f"{name:>10} {100 * found[name]:6.2f}")


def _ask(args: argparse.Namespace) -> None:
    from mach.inspect.ask import ask, json_lines, text_lines

    model = _load(args)
    found = ask(args.model, model, args.text, args.top_k, estimator=args.estimator, as_asked=args.json)
    if found.doubt:
        print(f"mach ask: {found.doubt}", file=sys.stderr)
    for line in (json_lines if args.json else text_lines)(found, model, args.text):
        _say(line)


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from mach.compare.report import render_parts, render_table
    from mach.compare.run import compare, read_configurations
    from mach.data import Dataset

    configurations = read_configurations(args.config)
    dataset = Dataset.open(args.data)
    _say(_describe(dataset))
    rows = compare(dataset, args.out, configurations, device=args.device, workers=args.workers, progress=True, say=_say)
    console = Console(width=max(110, Console().width))
    console.print(render_table(rows))
    if (parts := render_parts(rows)) is not None:
        console.print(parts)
    _say(f"report: {Path(args.out) / 'report.html'}")


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
        return _say(json.dumps({**told, "reranker": reranker_record(run.path), "calibration": probabilities}))
    sizes, config = run.sizes, run.config
    counts = f"{sizes.n_labels:,} labels, {sizes.n_buckets:,} buckets, {sizes.n_features:,} features"
    _say(f"{args.model}: {config.table} table, {counts}")
    _say(", ".join(f"{name}={value}" for name, value in config.to_dict().items()))
    for r in sorted({*records, *problems}):
        if r in problems:
            _say(f"repetition {r} {problems[r]}")
        else:
            facts = records[r]
            peak = f", {size_text(facts['peak_bytes'])} of memory at most" if "peak_bytes" in facts else ""
            learnt = ", similar labels together" if facts.get("is_grouped") else ""
            _say(f"repetition {r}: {facts['parameters']:,} parameters, {facts['train_s']:.1f} s of training{peak}{learnt}")
            if not found:  # without logs, what the repetition itself tells
                for line in show_parts(facts.get("parts_s", {})):
                    _say(line)
    if (second := reranker_record(run.path)) is not None:
        _say(show_reranker(second))
    if calibration is not None:
        _say(summary(calibration))
    for history in found:
        for line in show(history):
            _say(line)
    if args.plot:
        plot(found, args.plot)
        _say(f"plot: {args.plot}")


def _verify(args: argparse.Namespace) -> None:
    from mach.data import Dataset
    from mach.store import Run
    from mach.store.calibration import trouble

    if "splits" in _manifest(args.model):
        Dataset.open(args.model).verify()
        return _say(f"{args.model}: every file matches its checksum")
    run = Run.open(args.model)
    problems = run.verify() + ([broken] if (broken := trouble(args.model)) else [])
    if problems:
        raise ModelError(f"{args.model}: {'; '.join(problems)}")
    _say(f"{args.model}: {_repetitions(len(run.finished()))}, every file matches its checksum")


def _manifest(folder: str) -> Any:
    """Give a folder's manifest, or nothing where there is none to read: what opens the folder says so."""
    from mach.files import read_json

    try:
        return read_json(Path(folder) / "manifest.json")
    except (OSError, ValueError):
        return {}


def _plan(args: argparse.Namespace) -> None:
    from mach.hashing.bounds import propose

    plan = propose(args.labels, args.features, args.memory, args.delta, args.hidden, args.active_features)
    rates, products, forecasts = _forecasts(args, plan)
    if args.json:
        each = {name: asdict(found) for name, found in forecasts.items()}
        return _say(json.dumps({**asdict(plan), "forecast": {"rates": asdict(rates), **each}}))
    _say(f"{plan.n_labels:,} labels: --buckets {plan.n_buckets} --repetitions {plan.n_repetitions} --hidden {plan.hidden}")
    _say(f"chance that some two labels share all their buckets: {plan.failure_probability:.2g}")
    one, every = plan.collisions_one, plan.collisions_all
    _say(f"labels expected to share a label's bucket: {one:,.1f} in one repetition, {every:.2g} in all")
    _say(f"{'':26}{'hashed':>16}{'full head':>16}")
    for text, of in _PLAN_LINES:
        _say(f"{text:26}{of(plan.hashed):>16,}{of(plan.full):>16,}")
    hashed, full = forecasts["hashed"], forecasts["full"]
    totals = [sum(found.parts_s.values()) for found in (hashed, full)]
    _say(f"{'bytes at the peak':26}{hashed.peak_bytes:>16,}{full.peak_bytes:>16,}")
    if (second := hashed.second) is not None:
        for name, value in asdict(second).items():
            _say(f"{'  second stage, ' + name.replace('_', ' '):26}{value:>16,}{0:>16}")
    _say(f"{f'step of {args.batch_size} samples, ms':26}{1e3 * totals[0]:>16,.1f}{1e3 * totals[1]:>16,.1f}")
    for part in hashed.parts_s:
        shares = [100 * found.parts_s[part] / total for found, total in zip((hashed, full), totals, strict=True)]
        _say(f"{f'  {part}, %':26}{shares[0]:>16.1f}{shares[1]:>16.1f}")
    if args.features is None:
        _say("without the encoders' input layers; give --features to count them, too")
    if args.samples is None:
        _say("without the second stage, which orders the first labels anew; give --samples to count it, too")
    speeds = f"{rates.flops / 1e9:,.0f} GFLOP/s of {products} products and {rates.bytes / 1e9:.1f} GB/s of memory"
    _say(f"estimated with {speeds}, measured here just now; all repetitions of the hashed at once")


def _forecasts(args: argparse.Namespace, plan: Plan) -> tuple[Rates, str, dict[str, Forecast]]:
    """Forecast the training of both heads of a plan, with rates of the machine at hand."""
    from mach.model import Sizes, resolve_device, resolve_precision
    from mach.parallel.forecast import forecast, measure_rates
    from mach.parallel.second import Samples

    if args.samples is not None and args.features is None:
        raise ConfigError(f"samples={args.samples} needs --features: the second stage has weights of them")
    if not args.labels_a_sample > 0:
        raise ConfigError(f"labels_a_sample={args.labels_a_sample:g} must be above 0")
    features = args.features if args.active_features is None else args.active_features
    samples = None if args.samples is None else Samples(n=args.samples, features=features)
    device = resolve_device(args.device)
    hashed = Config(
        hidden=plan.hidden, repetitions=plan.n_repetitions, buckets=plan.n_buckets, batch_size=args.batch_size
    )  # fmt: skip
    products = resolve_precision(hashed.precision, device)
    rates = measure_rates(device, products)
    found = {}
    for name, config in (("hashed", hashed), ("full", hashed.replace(table="identity"))):
        sizes = Sizes(
            n_features=args.features or 0,
            n_labels=plan.n_labels,
            n_buckets=config.n_buckets(plan.n_labels),
            features="sparse",
            labels_a_sample=args.labels_a_sample,
        )
        how: dict[str, Any] = {"rates": rates, "device": device, "samples": samples}
        found[name] = forecast(config, sizes, active_features=args.active_features, **how)
    return rates, str(products).removeprefix("torch."), found


_PLAN_LINES: list[tuple[str, Callable[[Cost], int]]] = [
    ("parameters", lambda cost: cost.parameters),
    ("  of these in heads", lambda cost: cost.head_parameters),
    ("bytes of weights", lambda cost: cost.weight_bytes),
    ("bytes of the table", lambda cost: cost.table_bytes),
    ("bytes to train at once", lambda cost: cost.training_bytes),
    ("FLOPs a sample, heads", lambda cost: 2 * cost.head_multiply_adds),
    ("FLOPs a sample, encoders", lambda cost: 2 * cost.encoder_multiply_adds),
]
