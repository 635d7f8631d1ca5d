"""The command line: parse, call one function, print. Heavy modules are imported by the command that needs them.

Errors that a user can mend are one line on standard error, and exit status 2. `parser` lists the commands; the file of each holds
its arguments, its call and what it prints.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from mach.cli.parser import make_parser
from mach.cli.printing import complain, is_first
from mach.errors import MachError, Stopped

LINE_OF_CTRL_C = "\n"  # a terminal writes ^C and stays on its line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit status."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except MachError as error:
        complain(f"mach {args.command}: {error}")
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Stopped as stop:
        how = "--resume" if args.command == "train" else "the same command"
        if is_first():
            complain(f"{LINE_OF_CTRL_C if stop.status else ''}mach {args.command}: {stop}; go on with {how}")
        return stop.status
    except KeyboardInterrupt:
        complain(f"{LINE_OF_CTRL_C}mach {args.command}: stopped; checkpoints and finished files are kept")
        return 128 + signal.SIGINT
