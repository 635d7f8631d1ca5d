"""Answers for people: the best labels of texts, and how sure one may be of each, on a scale from 0 to 1."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.calibration import naive
from mach.config import Estimator
from mach.decoding import TopK
from mach.draw import bar
from mach.errors import ModelError
from mach.model import Model
from mach.store.calibration import has_calibration, load_calibration


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says of some texts."""

    top: TopK  # (N, k)
    shares_Nk: npt.NDArray[Any]  # probabilities where they are calibrated, else the scores on a scale from 0 to 1
    is_calibrated: bool
    doubt: str = ""  # why a calibration that is there does not speak


def ask(run: str | Path, model: Model, texts: Sequence[str], k: int, *, estimator: Estimator, as_asked: bool = False) -> Answers:
    """Give the k best labels of each text; with probabilities where the run is calibrated for these scores.

    Without, a softmax's logits are taken as log-probabilities, which rank alike and can be shown; not if `as_asked`, nor where a
    second stage adds to logits.
    Raises: as `Model.predict_topk`.
    """
    doubt = ""
    if has_calibration(run):
        try:
            calibration = load_calibration(run, model, estimator=estimator)
            top = model.predict_topk(texts, k, estimator=estimator)
            return Answers(top, calibration.probabilities(top.scores), True)
        except ModelError as error:
            doubt = f"not calibrated: {error}"
    if (estimator, model.config.loss, as_asked) == ("logits", "softmax", False) and model.reranker is None:
        estimator = "log-probs"
    top = model.predict_topk(texts, k, estimator=estimator)
    return Answers(top, np.asarray(naive(top.scores, estimator, len(model.repetitions))), False, doubt)


def text_lines(answers: Answers, model: Model, texts: Sequence[str]) -> Iterator[str]:
    """Give the lines that a person reads: a bar for each label."""
    for text, labels, shares in zip(texts, answers.top.labels.tolist(), answers.shares_Nk.tolist(), strict=True):
        yield text
        for label, share in zip(labels, shares, strict=True):
            yield f"  {bar(share)} {share:4.2f}  {model.name_of(label)}"


def json_lines(answers: Answers, model: Model, texts: Sequence[str]) -> Iterator[str]:
    """Give a JSON object for each text: labels, names, scores, and probabilities where they are calibrated."""
    for i, text in enumerate(texts):
        found = [
            {"label": label, "name": model.name_of(label), "score": score}
            | ({"probability": float(answers.shares_Nk[i, j])} if answers.is_calibrated else {})
            for j, (label, score) in enumerate(zip(answers.top.labels[i].tolist(), answers.top.scores[i].tolist(), strict=True))
        ]
        yield json.dumps({"text": text, "answers": found}, ensure_ascii=False)
