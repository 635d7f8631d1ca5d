"""What is printed: answers on standard output, at once; what went wrong on standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def say(text: str) -> None:
    """Print a line, and let who reads a pipe have it now."""
    print(text, flush=True)


def say_json(found: Any) -> None:
    """Print a JSON object on a line."""
    say(json.dumps(found))


def complain(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def is_first() -> bool:
    """Tell whether this process speaks for those that torchrun or horovodrun started with it."""
    return "0" == os.environ.get("RANK", os.environ.get("HOROVOD_RANK", "0"))


def repetitions_text(n: int) -> str:
    """Write a number of repetitions for people."""
    return f"{n} repetition{'' if n == 1 else 's'}"
