"""Who trains what and predicts what, and the runners that have it done."""

from mach.parallel.calibrating import calibrate
from mach.parallel.offline import predict
from mach.parallel.plan import plan_groups
from mach.parallel.runners import train

__all__ = ["calibrate", "plan_groups", "predict", "train"]
