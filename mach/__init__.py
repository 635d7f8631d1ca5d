"""mach: classification over millions of labels with hashed ensembles of small classifiers (MACH) and full heads.

config = mach.Config(buckets=256, repetitions=8)
model = mach.train(config, mach.Dataset.open("data"))
model.predict_topk(["Nueva York"], k=5)
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by torch when it loads, so before it; what the user has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # its idle threads would keep ours off the cores for ms
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages, for rows read in no order

_WHERE = {
    "Calibration": "mach.calibration",
    "Config": "mach.config",
    "ConfigError": "mach.errors",
    "DataError": "mach.errors",
    "Dataset": "mach.data",
    "LabelTable": "mach.hashing",
    "MachError": "mach.errors",
    "Model": "mach.model",
    "ModelError": "mach.errors",
    "TopK": "mach.decoding",
    "calibrate": "mach.parallel",
    "load": "mach.store",
    "load_calibration": "mach.store",
    "load_config": "mach.config",
    "precision_at_k": "mach.metrics",
    "prepare": "mach.data",
    "split_dev": "mach.data",
    "train": "mach.parallel",
    "write_dataset": "mach.data",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from mach.calibration import Calibration as Calibration
    from mach.config import Config as Config
    from mach.config import load_config as load_config
    from mach.data import Dataset as Dataset
    from mach.data import prepare as prepare
    from mach.data import split_dev as split_dev
    from mach.data import write_dataset as write_dataset
    from mach.decoding import TopK as TopK
    from mach.errors import ConfigError as ConfigError
    from mach.errors import DataError as DataError
    from mach.errors import MachError as MachError
    from mach.errors import ModelError as ModelError
    from mach.hashing import LabelTable as LabelTable
    from mach.metrics import precision_at_k as precision_at_k
    from mach.model import Model as Model
    from mach.parallel import calibrate as calibrate
    from mach.parallel import train as train
    from mach.store import load as load
    from mach.store import load_calibration as load_calibration


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import mach` alone loads nothing heavy."""
    if name not in _WHERE:
        raise AttributeError(f"module 'mach' has no attribute '{name}'")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `mach.train` the function: importing the package of that name would set the attribute to it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
