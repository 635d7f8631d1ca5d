"""Who trains what, and the runner that has it done."""

from mach.parallel.plan import plan_groups
from mach.parallel.runners import train

__all__ = ["plan_groups", "train"]
