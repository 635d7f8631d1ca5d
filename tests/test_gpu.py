"""Where there is a GPU: it learns what the CPU learns, a stopped run resumes to the same bits, and the CPU reads its model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mach.config import Config, Estimator
from mach.decoding import decode_topk
from mach.decoding.device import topk_on_device
from mach.decoding.scan import scan_topk
from mach.errors import ModelError
from mach.hashing.table import LabelTable
from mach.metrics import precision_at_k
from mach.parallel import train
from mach.store import Run, load
from mach.train import group
from mach.train.log import log_path, read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CONFIG = Config(buckets=20, repetitions=4, hidden=32, layers=1, batch_size=20, epochs=20)


@pytest.mark.parametrize("table", ["hashed", "identity"])
@pytest.mark.parametrize("features", ["tiny", "tiny_dense"])
def test_the_planted_problem_is_solved_and_the_cpu_reads_the_model(request, features, table, tmp_path):
    data = request.getfixturevalue(features)
    model = train(CONFIG.replace(table=table), data, tmp_path / "run", device="cuda:0")
    test = data.split("test")
    there = model.predict_topk(test.features, 3)
    assert precision_at_k(there.labels, test.labels, 1) >= 0.9
    here = load(tmp_path / "run", device="cpu").predict_topk(test.features, 3)
    np.testing.assert_allclose(here.scores, there.scores, rtol=1e-3, atol=1e-3)


def test_a_stopped_run_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch):
    train(CONFIG, tiny, tmp_path / "whole", device="cuda:0")
    steps, step = [], group.Group._step

    def stopped(self, ready, want_loss):
        steps.append(self.step)
        if len(steps) == 37:
            raise KeyboardInterrupt
        return step(self, ready, want_loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(group.Group, "_step", stopped)
        train(CONFIG, tiny, tmp_path / "cut", device="cuda:0", checkpoint_s=0)
    train(CONFIG, tiny, tmp_path / "cut", device="cuda:0", resume=True)
    for r in range(4):
        whole, cut = (load_file(Run.open(tmp_path / name).weights_path(r)) for name in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_time_by_part_is_the_devices_and_adds_up(tiny, tmp_path):
    train(CONFIG, tiny, tmp_path / "run", device="cuda:0")
    lines = [line for line in read_log(log_path(tmp_path / "run", range(4))) if "step" in line]
    assert all(seconds >= 0 for line in lines for seconds in line["parts_s"].values())
    assert 0.5 * lines[-1]["wall_s"] < sum(sum(line["parts_s"].values()) for line in lines) <= lines[-1]["wall_s"] + 0.01
    assert all(0 < line["bytes"] <= line["peak_bytes"] for line in lines)


def test_a_value_that_is_not_finite_stops_it_and_its_step_is_named(tiny, tmp_path, monkeypatch):
    step = group.Group._step

    def planted(self, rows, want_loss):
        if self.step == 12:
            self.packed.parameters["head.weight"][2, 0, 0] = float("nan")
        return step(self, rows, want_loss)

    monkeypatch.setattr(group.Group, "_step", planted)
    with pytest.raises(ModelError, match=r"^repetition 2: the loss or a gradient is not finite after step 13 of 200 "):
        train(CONFIG, tiny, tmp_path / "run", device="cuda:0")


@pytest.mark.parametrize("family", ["carter-wegman", "multiply-shift", "xxhash"])
@pytest.mark.parametrize("estimator", Estimator.__args__)
@pytest.mark.parametrize("how", ["torch", "triton"])
def test_equal_scores_are_decoded_to_the_bits_of_the_cpu(family, estimator, how):
    if how == "triton":
        pytest.importorskip("triton")
    names = [str(i) for i in range(70_001)]
    table = LabelTable.hashed(70_001, 300, 9, family=family, label_names=names)
    rng = np.random.default_rng(0)
    for k, digits in ((1, 1), (5, 6), (300, 1)):  # rounded: sums tie often
        scores_NRB = rng.normal(size=(11, 9, 300)).round(digits).astype(np.float32)
        found = topk_on_device(torch.from_numpy(scores_NRB).cuda(), table, k, estimator=estimator, how=how)
        expected = scan_topk(scores_NRB, table.array(), k, estimator=estimator)
        assert np.array_equal(found.labels.cpu().numpy(), expected.labels)
        assert np.array_equal(found.scores.cpu().numpy(), expected.scores)


@pytest.mark.parametrize("table", [LabelTable.identity(3000), LabelTable.hashed(3000, 200, 6)])
@pytest.mark.parametrize("loss", ["softmax", "logistic"])
def test_a_tensor_is_decoded_where_it_is(table, loss):
    logits_NRB = np.random.default_rng(0).normal(0, 3, (5, table.n_repetitions, table.n_buckets)).astype(np.float32)
    how = {"loss": loss, "restrict": range(0, 3000, 2), "exclude": [[2 * n] for n in range(5)]}
    for estimator in Estimator.__args__:
        here = decode_topk(logits_NRB.copy(), table, 20, estimator=estimator, **how)
        there = decode_topk(torch.from_numpy(logits_NRB).cuda(), table, 20, estimator=estimator, **how)
        np.testing.assert_allclose(there.scores, here.scores, rtol=1e-5, atol=1e-6)
        if estimator == "logits":
            assert np.array_equal(there.labels, here.labels)
