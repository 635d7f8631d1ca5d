"""`python -m mach.cli` is `mach`, too."""

from mach.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
