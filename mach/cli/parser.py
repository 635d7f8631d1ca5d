"""The parser: every command in the order of the help, and errors that are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mach.cli.comparing import COMPARE, EVALUATE
from mach.cli.datasets import PREPARE, SPLIT
from mach.cli.looking import INSPECT, VERIFY
from mach.cli.pieces import DECODE, SCORE
from mach.cli.planning import PLAN
from mach.cli.predicting import ASK, CALIBRATE, PREDICT
from mach.cli.printing import say
from mach.cli.training import RERANK, TRAIN

COMMANDS = (
    PREPARE, SPLIT, TRAIN, RERANK, PREDICT, CALIBRATE, SCORE, DECODE, EVALUATE, ASK, COMPARE, INSPECT, VERIFY, PLAN,
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Give the parser of all commands; what it parses has `command`, the name, and `run`, to be called with it."""
    parser = _Parser(prog="mach", description="Classification over millions of labels: hashed ensembles and full heads.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.text, description=command.text)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        say(f"mach {version('mach')}")
        parser.exit()
