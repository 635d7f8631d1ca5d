"""What a comparison knows of each configuration, of the data and of the machine: plain values, and how to write them."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = {  # of a step, and the clock's parts in each
    "encoder": ("forward", "backward", "rows"),
    "head forward": ("head forward",),
    "head backward": ("head backward",),
    "update": ("update",),
    "communication": ("communication",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration, trained and evaluated on the test split."""

    name: str
    config: Mapping[str, Any]  # `table` is "identity" for the full head
    metrics: Mapping[str, float]  # "P@1" and so on, in [0, 1]
    train_s: float
    parameters: int
    bytes: int  # of the model folder
    predict_s: float  # from features to top-k, the whole test split
    decode_s: float  # of these, from bucket scores to top-k
    n_test: int
    peak_bytes: int  # of training, measured
    predicted_bytes: int = 0  # what `mach.parallel.memory` says of it beforehand; 0: it was not asked
    parts_s: Mapping[str, float] = field(default_factory=dict)  # of training, by part of a step as the clock has them
    by_repetitions: Sequence[tuple[int, Mapping[str, float]]] = ()  # (R decoded with, metrics), R rising

    @property
    def is_full(self) -> bool:
        """Say whether this is the full head, to which the others are compared."""
        return self.config.get("table") == "identity"

    @property
    def time_by_part(self) -> dict[str, float]:
        """Give the seconds of training by the parts of `PARTS`, all other work as "rest"; nothing where none was measured."""
        known = {part for parts in PARTS.values() for part in parts}
        found = {name: sum(self.parts_s.get(part, 0.0) for part in parts) for name, parts in PARTS.items()}
        rest = sum(seconds for part, seconds in self.parts_s.items() if part not in known)
        return {name: seconds for name, seconds in {**found, "rest": rest}.items() if seconds}

    @property
    def predict_ms(self) -> float:
        """Give the milliseconds a query takes from features to top-k."""
        return 1e3 * self.predict_s / max(self.n_test, 1)

    @property
    def decode_ms(self) -> float:
        """Give the milliseconds a query takes from bucket scores to top-k."""
        return 1e3 * self.decode_s / max(self.n_test, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The data set of a comparison."""

    name: str
    n_train: int  # N
    n_test: int
    n_features: int  # F
    n_labels: int  # K
    labels_a_point: float


def this_machine() -> dict[str, str]:
    """Name the processor, the cores this process may use, the GPU if there is one, and the versions at work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"CPU": _cpu_model(), "cores": str(cores), "system": f"{platform.system()} {platform.machine()}"}
    facts["python"] = platform.python_version()
    facts |= {package: _version(package) for package in ("mach", "torch", "numpy", "numba")}
    import torch

    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def scaled(value: float, unit: str = "") -> str:
    """Write a number with three figures and a decimal prefix: 1234567 -> `1.23 M`, and with a unit `1.23 MB`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{three(value / factor)} {prefix}{unit}"
    return f"{three(value)} {unit}".rstrip()


def three(value: float) -> str:
    """Write a number with three figures and no exponent, two below 0.1: `1,235`, `12.3`, `0.12`, `0.0042`."""
    if value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    if value >= 0.0995:
        return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def plain(value: float, unit: str) -> str:
    """Write a number with three figures and its unit, without prefix: `1,240 s`, `0.42 ms`."""
    return f"{three(value)} {unit}"


def percent(value: float | None) -> str:
    """Write a share as a percentage with two decimals and no sign; a hyphen for a metric that was not measured."""
    return "-" if value is None else f"{100 * value:.2f}"
