"""Training that is no longer finite stops at once, says where, and spoils nothing that was saved."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mach.config import Config
from mach.errors import ModelError
from mach.parallel import train
from mach.store import Run
from mach.store.folder import sizes_of, table_of
from mach.train import finite
from mach.train.checkpoint import checkpoint_path, read_progress
from mach.train.finite import FiniteWatch, Place, is_finite
from mach.train.loop import Group

CONFIG = Config(buckets=13, repetitions=3, hidden=9, layers=1, batch_size=30, epochs=3, precision="float32")  # 7 steps an epoch
NAN, INF = float("nan"), float("inf")


def group_of(dataset, config=CONFIG, repetitions=(0, 4, 7)):
    sizes = sizes_of(config, dataset)
    return Group(config, dataset, sizes, table_of(config, sizes, repetitions, None), torch.device("cpu"))


def place_of(message):
    """Give repetitions, step, epoch and samples that an error names."""
    found = re.match(
        r"repetitions? ([\d, ]+): .* is not finite after step (\d+) of 21 \(epoch (\d)\), whose batch holds the training samples "
        r"([\d, ]+), \.\.\. \(counted from 0\); what was saved before is kept; look at these samples, or try ",
        message,
    )
    return [int(r) for r in found[1].split(", ")], int(found[2]), int(found[3]), [int(i) for i in found[4].split(", ")]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["input.weight", "input.bias", "layers.0.weight", "layers.0.bias", "head.weight", "head.bias"])
@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared-hinge"])
def test_a_planted_value_is_found_within_an_epoch_and_its_step_is_named(tiny, name, value, loss):
    """In the next step, but for a row of the input layer: that is when a batch holds its feature. An infinity may hide in a unit
    that is dead or an output that is sure, until the epoch ends."""
    group, seen, take = group_of(tiny, CONFIG.replace(loss=loss)), [], Group._step

    def noted(ready, want_loss):
        seen.append(ready.rows)
        return take(group, ready, want_loss)

    group._step = noted
    with pytest.raises(ModelError) as caught:
        for record in group.steps(lambda r: None):
            if record.step == 3:
                group.packed.parameters[name].select(1 if name == "input.weight" else 0, 1)[2] = value
    repetitions, step, epoch, samples = place_of(str(caught.value))
    if value != value and name != "input.weight":
        assert repetitions == [4] and step == 4
    is_found_by_the_epoch = step == 7 and f": {name}" in str(caught.value)
    assert 4 <= step <= 7 and (repetitions == [4] or is_found_by_the_epoch)
    assert epoch == 1 + (step - 1) // 7 and samples == seen[step - 1][:8].tolist() and len(seen) == step


@pytest.mark.parametrize("rates", [{"learning_rate": 1e38}, {"input_learning_rate": 1e38}, {"learning_rate": 1e30, "epochs": 2}])
def test_absurd_step_sizes_are_named(tiny, rates):
    config = CONFIG.replace(warmup=0, normalize=False, **rates)
    with pytest.raises(
        ModelError,
        match=r"smaller steps than learning_rate=[\de.+]+, input_learning_rate=[\de.+]+ or normalize=true, in another --out$",
    ):
        list(group_of(tiny, config).steps(lambda r: None))


def test_a_sound_run_is_not_disturbed(tiny):
    group = group_of(tiny)
    assert len(list(group.steps(lambda r: None))) == 21
    group.refuse_what_is_not_finite()


@pytest.mark.parametrize("patience", [0, 5])
@pytest.mark.parametrize("repetitions", [1, 2])
def test_the_last_good_checkpoint_stays(tiny, tmp_path, monkeypatch, patience, repetitions):
    """A checkpoint was due after every step; the value is planted where no loss and no gradient of this step meets it."""
    config, take = CONFIG.replace(patience=patience, repetitions=repetitions), Group._step

    def planted(self, rows, want_loss):
        loss = take(self, rows, want_loss)
        if self.step == 11:
            self.packed.parameters["input.weight"][5, 0] = NAN
        return loss

    with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"input\.weight is not finite after step 11 of 21"):
        patch.setattr(Group, "_step", planted)
        train(config, tiny, tmp_path / "run", checkpoint_s=0)
    assert read_progress(checkpoint_path(tmp_path / "run", range(repetitions)))["step"] == 10
    assert Run.open(tmp_path / "run").finished() == []
    for file in (tmp_path / "run").glob("checkpoints/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())
    train(config, tiny, tmp_path / "run", resume=True)
    train(config, tiny, tmp_path / "truth")
    for r in range(repetitions):
        ours, theirs = (load_file(Run.open(tmp_path / name).weights_path(r)) for name in ("run", "truth"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("patience", [0, 5])
def test_nothing_that_is_not_finite_is_stored_at_the_end(tiny, tmp_path, monkeypatch, patience):
    """Planted in the last step, where no later one could meet it."""
    take = Group._step

    def planted(self, rows, want_loss):
        loss = take(self, rows, want_loss)
        if self.step == self.n_steps:
            self.optimizer.state["input.weight.second"][7, 0] = INF
        return loss

    monkeypatch.setattr(Group, "_step", planted)
    with pytest.raises(ModelError, match=r"repetition 0: optimizer\.input\.weight\.second is not finite after step 21"):
        train(CONFIG.replace(repetitions=1, patience=patience), tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").finished() == []


class Late:
    """Numbers on a device that send themselves when somebody waits for them."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, *values):
        self.values = torch.tensor(values)


def test_a_device_is_judged_a_step_late_and_its_own_step_is_named(monkeypatch):
    waited = []

    def send(late):
        return late.values, lambda: waited.append(late)

    monkeypatch.setattr(finite, "_send", send)
    watch, places = (
        FiniteWatch(CONFIG, CONFIG.rates(200, 40, 16, 2), [3, 5]),
        [Place(i, 21, 1, np.arange(10) + i) for i in range(1, 5)],
    )
    good, bad = Late(1.0, 2.0), Late(1.0, INF)
    watch.note(good, places[0])
    assert waited == []
    watch.note(bad, places[1])
    assert waited == [good]
    with pytest.raises(ModelError, match=r"^repetition 5: the loss or a gradient is not finite after step 2 of 21 .* 2, 3, 4,"):
        watch.note(good, places[2])
    watch.note(bad, places[3])
    with pytest.raises(ModelError, match="after step 4 "):
        watch.settle()
    watch.settle()  # said once


@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_is_finite(values, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    assert is_finite(tensor) == bool(tensor.isfinite().all())
