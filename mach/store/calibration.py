"""A run's calibration on disk: `calibration.json` in the run folder, with whose scores it reads.

    format, method, knot_scores, knot_probabilities, thresholds, of, measured, checksum

A calibration of other scores would give probabilities that nothing stands behind, so it is refused: `scores_key` says what made
scores, and both must agree.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mach.calibration import Bools, Calibration, Threshold, check_share
from mach.config import Estimator
from mach.errors import ConfigError, ModelError
from mach.files import read_json, write_json
from mach.model import DEFAULT_ESTIMATOR, Model
from mach.store.folder import format_repetitions

FORMAT = 1
FILE = "calibration.json"
METHOD = "isotonic"
MEANINGS = {"estimator": "estimator", "repetitions": "repetitions", "model": "trained model (fingerprint)"}


@dataclass(frozen=True)
class Trust:
    """The probabilities that a job writes beside its scores, and from which score and probability on it keeps a label."""

    calibration: Calibration
    precision: float | None = None  # wanted; None: keep whatever the score
    min_probability: float | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            self.calibration.threshold(self.precision)
        if self.min_probability is not None:
            check_share("min_probability", self.min_probability)

    @property
    def facts(self) -> dict[str, Any]:
        """Give what identifies it."""
        found: dict[str, Any] = {"calibration": fingerprint(self.calibration)}
        if self.precision is not None:
            found |= {"precision": self.precision, "least_score": self.least_score}
        return found if self.min_probability is None else found | {"min_probability": self.min_probability}

    @property
    def least_score(self) -> float:
        """Give the least score that is kept."""
        score = None if self.precision is None else self.calibration.threshold(self.precision).score
        return -math.inf if score is None else score

    def keep(self, scores: npt.NDArray[np.float32], probabilities: npt.NDArray[np.float32]) -> Bools:
        """Tell which labels are kept."""
        is_kept: Bools = (scores >= self.least_score) & (probabilities >= np.float32(self.min_probability or 0))
        return is_kept


def scores_key(model: Model, estimator: Estimator) -> dict[str, Any]:
    """Give what makes a model's scores, as plain values: equal keys, equal scores but for rounding.

    Weights are known by their biases, which every step of training changes: reading all weights would take as long as
    predicting.
    """
    settings = model.config.to_dict()
    del settings["repetitions"]  # those that are held count
    digest = xxhash.xxh3_64(repr((settings, model.table.to_dict())).encode())
    for packed in model.repetitions:
        for name in ("input.bias", "head.bias"):
            digest.update(packed.parameters[name].cpu().numpy().tobytes())
    key = {"estimator": estimator, "repetitions": format_repetitions(model.table.repetitions), "model": digest.hexdigest()}
    second = model.reranker if estimator == DEFAULT_ESTIMATOR else None
    return key | ({} if second is None else {"reranker": second.key})


def write_calibration(run: str | Path, calibration: Calibration) -> None:
    """Write a calibration into a run folder, in the place of an older one.

    Raises: ModelError if the disk refuses.
    """
    content = {
        "format": FORMAT,
        "method": METHOD,
        "knot_scores": calibration.knot_scores.tolist(),
        "knot_probabilities": calibration.knot_probabilities.tolist(),
        "thresholds": [dataclasses.asdict(threshold) for threshold in calibration.thresholds],
        "of": dict(calibration.of),
        "measured": dict(calibration.measured),
    }
    path = Path(run) / FILE
    try:
        write_json(path, content | {"checksum": _checksum(content)})
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from error


def has_calibration(run: str | Path) -> bool:
    """Tell whether a run folder holds a calibration, of whatever scores."""
    return (Path(run) / FILE).exists()


def read_calibration(run: str | Path) -> Calibration:
    """Read the calibration of a run folder, whosever scores it reads.

    Raises: ModelError if there is none, it is broken, or of another format.
    """
    path = Path(run) / FILE
    again = "make it again with `mach calibrate`"
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{run}: is not calibrated (no {FILE}); make one with `mach calibrate`") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is broken ({error}); {again}") from error
    if content.get("format") != FORMAT:
        raise ModelError(f"{path}: has format {content.get('format')}, this version of mach reads format {FORMAT}; {again}")
    if content.pop("checksum", None) != _checksum(content):
        raise ModelError(f"{path}: does not match its own checksum; {again}")
    try:
        return Calibration(
            knot_scores=np.array(content["knot_scores"], np.float64),
            knot_probabilities=np.array(content["knot_probabilities"], np.float64),
            thresholds=tuple(Threshold(**each) for each in content["thresholds"]),
            of=content["of"],
            measured=content["measured"],
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is broken ({error}); {again}") from error


def trouble(run: str | Path) -> str:
    """Say what is wrong with a run's calibration; nothing if it is sound, or there is none."""
    try:
        if has_calibration(run):
            read_calibration(run)
        return ""
    except ModelError as error:
        return str(error)


def load_calibration(run: str | Path, model: Model, *, estimator: Estimator = DEFAULT_ESTIMATOR) -> Calibration:
    """Load the calibration of a run folder for the scores of a model.

    Args:   model, as loaded from the folder; estimator, which its scores are made with.
    Raises: ModelError as `read_calibration`, or if it was fitted on scores that were made otherwise: says what differs.
    """
    calibration = read_calibration(run)
    there, here = calibration.of["scores"], scores_key(model, estimator)
    differ = [f"{MEANINGS.get(name, name)} {there.get(name)} there, {here.get(name)} now" for name in {**there, **here}
              if there.get(name) != here.get(name)]  # fmt: skip
    if len(differ) > 1:  # what the model is made of follows from its repetitions
        differ = [text for text in differ if not text.startswith(MEANINGS["model"])]
    if differ:
        raise ModelError(
            f"{Path(run) / FILE}: was fitted on other scores ({'; '.join(differ)}); calibrate these with `mach calibrate`"
        )
    return calibration


def trust_in(
    run: str | Path,
    model: Model,
    estimator: Estimator,
    *,
    probabilities: bool = False,
    precision: float | None = None,
    min_probability: float | None = None,
) -> Trust | None:
    """Give what a job makes of the calibration of its run, None if nothing of it is wanted.

    Raises: ModelError as `load_calibration`; ConfigError if the precision has no threshold, or the probability is none.
    """
    if not probabilities and precision is None and min_probability is None:
        return None
    return Trust(load_calibration(run, model, estimator=estimator), precision, min_probability)


def fingerprint(calibration: Calibration) -> str:
    """Give 16 hexadecimal digits that identify a map and what it reads."""
    arrays = (calibration.knot_scores.tobytes(), calibration.knot_probabilities.tobytes())
    return xxhash.xxh3_64_hexdigest(b"".join(arrays) + _text(calibration.of["scores"]))


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_text(content))


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
