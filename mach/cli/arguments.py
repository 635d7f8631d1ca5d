"""Arguments that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from mach.config import Estimator

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Command(NamedTuple):
    """A command: how it is called, what it says of itself, what it asks for and what it does."""

    name: str
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def plain_value(text: str) -> Any:
    """Read a number as int or float where it is one; `Config` judges it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add where to work, for what works in processes."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i (default auto: every GPU, or the CPU)")
    parser.add_argument("--workers", type=int, help="processes (default: one a GPU, or one)")


def add_top_k(parser: argparse.ArgumentParser) -> None:
    """Add k, for a whole split."""
    parser.add_argument("--top-k", type=int, help="labels a sample (default 100, or all K if they are fewer)")


def add_estimator(parser: argparse.ArgumentParser) -> None:
    """Add how repetitions decode, and which."""
    parser.add_argument("--estimator", default="logits", choices=get_args(Estimator), help="how bucket scores make a label's")
    parser.add_argument("--repetitions", help="decode with some of the repetitions only: a count, or numbers such as 0-7")


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Add how a run is loaded and decodes; `how_asked` reads it."""
    add_estimator(parser)
    parser.add_argument("--skip-broken", action="store_true", help="leave out repetitions that are missing or broken")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i")


def how_asked(args: argparse.Namespace) -> dict[str, Any]:
    """Give what `add_asking` asked for, as keywords."""
    return {
        "estimator": args.estimator,
        "repetitions": numbers(args.repetitions),
        "skip_broken": args.skip_broken,
        "device": args.device,
    }


def numbers(text: str | None) -> list[int] | None:
    """Read numbers of repetitions; None where there are none given."""
    from mach.store.folder import parse_repetitions

    return parse_repetitions(text) if text else None


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add what may be found."""
    parser.add_argument("--restrict", metavar="FILE", help="labels to choose among: an id or name a line, or an npy of ids")
    parser.add_argument(
        "--exclude", metavar="FILE", help="labels that each sample may not find: a line each, between commas, or a CSR npz"
    )


def count(text: str) -> int:
    """Read `3000000`, `3m`, `8G`, `8GiB`."""
    number = text.lower().removesuffix("b")
    digits = number.rstrip("kmgti")
    try:
        return round(float(digits) * UNITS[number[len(digits) :]])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 3000000, 3m, 8G or 8GiB") from None
