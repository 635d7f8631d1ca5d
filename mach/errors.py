"""The errors that a user can cause and mend; the command line prints them as one line and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MachError(ValueError):
    """Something that was given cannot work; the text names what came, what is allowed and what to do."""


class ConfigError(MachError):
    """A setting that cannot work: names the field, its value and the allowed range."""


class DataError(MachError):
    """A data file or data set that cannot be used: names the file, the line where there is one, and the cure."""


class ModelError(MachError):
    """A run folder that is missing, broken, of another format or of another data set."""


class RankLost(MachError):
    """Another process that trains the same model is gone or stuck: names its rank, and why where that is known."""


class MissingExtra(MachError):
    """An optional package is absent: names what needs it and the pip line that brings it."""

    def __init__(self, purpose: str, extra: str):
        super().__init__(purpose, extra)  # these travel between processes; a worker's error is raised again in the parent

    def __str__(self) -> str:
        return "{} needs an optional package: pip install 'mach[{}]'".format(*self.args)


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, by SIGTERM or Ctrl-C, and did: says where it stands, and the exit status that fits.

    No MachError, as nothing is wrong; what waits for Ctrl-C gets it.
    """

    def __init__(self, where: str, status: int):
        super().__init__(where, status)
        self.where, self.status = where, status

    def __str__(self) -> str:
        return self.where


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Give `; did you mean 'x'?` for the allowed word closest to a mistyped one, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
