"""What is kept on disk of a trained model: one folder a run, one file a repetition."""

from mach.store.calibration import load_calibration
from mach.store.folder import Run, load

__all__ = ["Run", "load", "load_calibration"]
