"""`python -m mach` is `mach`."""

from mach.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
