"""What drawings share: bars and lines of block characters for terminals, bars of progress, colours for charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARK = "▁▂▃▄▅▆▇█"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: told apart by nearly everybody
INK, MUTED, LINE = "#1b1f24", "#59616b", "#d8dde3"


def bar(share: float, width: int = 20) -> str:
    """Draw a share in [0, 1] as a bar of `width` characters, exact to an eighth of one."""
    eighths = round(share * width * 8)
    return (BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()).ljust(width)


def spark(values: Sequence[float], width: int = 60, *, log: bool = False) -> str:
    """Draw the finite of the values as a line of at most `width` characters, from the least to the largest.

    log: on a logarithmic scale, as losses fall fast; values up to 1e-12 are drawn as that.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    step = max(1.0, len(finite) / width)
    picked = [finite[int(i * step)] for i in range(min(width, len(finite)))]
    drawn = [math.log(max(value, 1e-12)) for value in picked] if log else [value / 2 for value in picked]  # a span stays finite
    low, span = min(drawn), (max(drawn) - min(drawn)) or 1.0
    return "".join(SPARK[round((value - low) / span * (len(SPARK) - 1))] for value in drawn)


@contextmanager
def progress_bar(text: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error, if it is a terminal, while the block runs; yield a function of (done, total)."""
    from rich.console import Console  # here, as most commands need none of it
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
