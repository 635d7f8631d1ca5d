"""calibration.json: its frozen form, the same map again, and refused for scores that were made otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mach.calibration import Calibration, Threshold
from mach.config import Config
from mach.errors import ConfigError, ModelError
from mach.parallel import train
from mach.store.calibration import (
    FILE,
    Trust,
    fingerprint,
    has_calibration,
    load_calibration,
    read_calibration,
    scores_key,
    trouble,
    trust_in,
    write_calibration,
)

GOLDEN = """{
 "format": 1,
 "method": "isotonic",
 "knot_scores": [
  -1.5,
  2.0
 ],
 "knot_probabilities": [
  0.25,
  0.75
 ],
 "thresholds": [
  {
   "wanted": 0.9,
   "score": 1.25,
   "precision": 0.95,
   "recall": 0.5,
   "coverage": 0.75,
   "n_kept": 40,
   "held_out": 0.875
  },
  {
   "wanted": 0.99,
   "score": null,
   "precision": 0.0,
   "recall": 0.0,
   "coverage": 0.0,
   "n_kept": 0,
   "held_out": null
  }
 ],
 "of": {
  "run": "cafe",
  "scores": {
   "estimator": "logits",
   "repetitions": "0-1",
   "model": "beef"
  },
  "data": "f00d",
  "split": "dev",
  "n_samples": 40,
  "k": 7
 },
 "measured": {
  "after": {
   "ECE@1": 0.125
  }
 },
 "checksum": "61019d108f2a7e06703c660505685a4d"
}
"""


def made(scores_of=None, **changes):
    of = {"run": "cafe", "scores": scores_of or {"estimator": "logits", "repetitions": "0-1", "model": "beef"}}
    parts = {
        "knot_scores": np.array([-1.5, 2.0]),
        "knot_probabilities": np.array([0.25, 0.75]),
        "thresholds": (
            Threshold(wanted=0.9, score=1.25, precision=0.95, recall=0.5, coverage=0.75, n_kept=40, held_out=0.875),
            Threshold(wanted=0.99, score=None),
        ),
        "of": of | {"data": "f00d", "split": "dev", "n_samples": 40, "k": 7},
        "measured": {"after": {"ECE@1": 0.125}},
    }
    return Calibration(**(parts | changes))


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0), tiny, path)
    return path


@pytest.fixture(scope="module")
def model(path):
    from mach.store import load

    return load(path, device="cpu")


def test_the_form_is_frozen(tmp_path):
    """Older runs hold such files: a change needs a new format number."""
    write_calibration(tmp_path, made())
    text = (tmp_path / FILE).read_text()
    assert text == GOLDEN
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20, unique=True), st.data())
def test_the_same_map_comes_back(tmp_path_factory, scores, data):
    folder = tmp_path_factory.mktemp("c")
    shares = st.lists(st.floats(0, 1), min_size=len(scores), max_size=len(scores))
    here = made(knot_scores=np.array(sorted(scores)), knot_probabilities=np.array(sorted(data.draw(shares))))
    write_calibration(folder, here)
    there = read_calibration(folder)
    assert np.array_equal(there.knot_scores, here.knot_scores)
    assert np.array_equal(there.knot_probabilities, here.knot_probabilities)
    assert (there.thresholds, there.of, there.measured) == (here.thresholds, here.of, here.measured)
    assert fingerprint(there) == fingerprint(here)


def test_the_fingerprint_tells_maps_and_their_scores_apart():
    others = [
        made(knot_scores=np.array([-1.5, 3.0])),
        made(knot_probabilities=np.array([0.25, 0.5])),
        made(scores_of={"estimator": "mean", "repetitions": "0-1", "model": "beef"}),
    ]
    assert len({fingerprint(each) for each in (made(), *others)}) == 4
    assert fingerprint(made(thresholds=())) == fingerprint(made())


def test_what_is_broken_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"is not calibrated \(no calibration\.json\); make one with `mach calibrate`"):
        read_calibration(tmp_path)
    assert not has_calibration(tmp_path) and trouble(tmp_path) == ""
    write_calibration(tmp_path, made())
    assert has_calibration(tmp_path) and trouble(tmp_path) == ""
    file = tmp_path / FILE
    good = file.read_text()
    for text, words in [
        (good.replace("-1.5", "-1.6"), "does not match its own checksum; make it again with `mach calibrate`"),
        (good.replace('"format": 1', '"format": 2'), "has format 2, this version of mach reads format 1"),
        (good[:100], r"is broken \("),
        ("[]", "holds list, not an object"),
    ]:
        file.write_text(text)
        with pytest.raises(ModelError, match=rf"calibration\.json: .*{words}"):
            read_calibration(tmp_path)
        assert trouble(tmp_path)
    with pytest.raises(ModelError, match=r"absent/calibration\.json: cannot be written \(No such file"):
        write_calibration(tmp_path / "absent", made())


def test_the_key_is_of_all_that_makes_scores(path, model, tiny, tmp_path):
    key = scores_key(model, "logits")
    assert list(key) == ["estimator", "repetitions", "model"] and key["repetitions"] == "0-2"
    assert scores_key(model, "mean") == key | {"estimator": "mean"}
    assert scores_key(model.select([0, 1]), "logits")["repetitions"] == "0-1"
    again = train(Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0), tiny, tmp_path / "again")
    assert scores_key(again, "logits") == key
    other = train(Config(buckets=13, repetitions=3, hidden=8, epochs=2, batch_size=100, rerank=0), tiny, tmp_path / "other")
    assert scores_key(other, "logits")["model"] != key["model"]
    changed = train(Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0), tiny, tmp_path / "changed")
    changed.repetitions[1].parameters["head.bias"] = torch.nextafter(
        changed.repetitions[1].parameters["head.bias"], torch.tensor(9.0)
    )
    assert scores_key(changed, "logits")["model"] != key["model"]


def test_a_calibration_of_other_scores_is_refused(path, model, tmp_path):
    write_calibration(tmp_path, made(scores_of=scores_key(model, "logits")))
    assert load_calibration(tmp_path, model).of["split"] == "dev"
    for other, estimator, words in [
        (model, "mean", "estimator logits there, mean now"),
        (model.select([0, 2]), "logits", "repetitions 0-2 there, 0,2 now"),
        (model.select([0]), "min", "estimator logits there, min now; repetitions 0-2 there, 0-0 now"),
    ]:
        with pytest.raises(ModelError, match=rf"was fitted on other scores \({words}\); calibrate these with `mach calibrate`"):
            load_calibration(tmp_path, other, estimator=estimator)
    write_calibration(tmp_path, made(scores_of=scores_key(model, "logits") | {"model": "beef"}))
    with pytest.raises(ModelError, match=r"\(trained model \(fingerprint\) beef there, [0-9a-f]{16} now\)"):
        load_calibration(tmp_path, model)
    write_calibration(tmp_path, made(scores_of=scores_key(model, "logits") | {"ranker": "cafe"}))
    with pytest.raises(ModelError, match=r"\(ranker cafe there, None now\)"):
        load_calibration(tmp_path, model)


def test_what_is_kept():
    scores = np.array([[2.0, 1.25, 1.0]], np.float32)
    probabilities = made().probabilities(scores)
    assert Trust(made()).keep(scores, probabilities).all()
    assert Trust(made(), precision=0.9).keep(scores, probabilities).tolist() == [[True, True, False]]
    assert Trust(made(), min_probability=0.7).keep(scores, probabilities).tolist() == [[True, False, False]]
    assert Trust(made(), 0.9, 0.1).keep(scores, probabilities).tolist() == [[True, True, False]]
    assert (
        len({str(t.facts) for t in (Trust(made()), Trust(made(), 0.9), Trust(made(), None, 0.9), Trust(made(), 0.9, 0.9))}) == 4
    )


def test_what_cannot_be_kept_is_named(path, model):
    with pytest.raises(ConfigError, match=r"precision=0\.99 is reached by no score"):
        Trust(made(), precision=0.99)
    for p in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"min_probability={p:g} must lie in \(0, 1\]"):
            Trust(made(), min_probability=p)
    assert trust_in(path, model, "logits") is None
    for wanted in ({"probabilities": True}, {"precision": 0.9}, {"min_probability": 0.5}):
        with pytest.raises(ModelError, match="is not calibrated"):
            trust_in(path, model, "logits", **wanted)
