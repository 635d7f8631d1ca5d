"""What the second stage takes: counted by hand, bounded, and held against what a small one writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import Config
from mach.kernels import N_THREADS
from mach.model import Sizes
from mach.parallel import judge as judge_module
from mach.parallel import rerank as rerank_module
from mach.parallel import train
from mach.parallel.judge import Judge
from mach.parallel.memory import PROCESS_BYTES, step_bytes
from mach.parallel.second import CPU, LATER_BYTES, THREAD_BYTES, Samples, n_weights, second_stage
from mach.store import Run
from mach.store.reranker import reranker_record

SIZES = Sizes(n_features=1000, n_labels=500, n_buckets=64, hidden=32, features="sparse", labels_a_sample=1.5)
SAMPLES = Samples(n=10_000, features=12.0)
CONFIG = Config(hidden=32, repetitions=3, input_precision="float32", rerank_cost=0.2, rerank_weight=1.0)


def test_weights_and_files_are_counted_by_hand():
    found = second_stage(CONFIG, SIZES, SAMPLES)
    weights = round(500 * 4 * (10_000 * 1.5 * 12 / 500) ** 0.5)
    assert (found.parameters, found.bytes) == (weights + 500, 6 * weights + 12 * 500)
    assert found.lists_bytes == 8 * 22 * 10_000  # 20 labels, and two that may be right
    assert found.disk_bytes == 2 * found.lists_bytes
    weighed = second_stage(CONFIG.replace(rerank_weight="auto"), SIZES, SAMPLES)
    kept = 10_000 * (6 * 12 + 4 * 1.5) + 2 * 8 * 10_001  # samples, if they vote
    assert weighed.parameters == 2 * found.parameters + 10_000 * 12  # as many of prototypes
    assert weighed.bytes == 2 * found.bytes + kept
    assert weighed.disk_bytes == 8 * 22 * 10_000 + max(8 * 22 * 10_000, 4 * 22 * 10_000 + weighed.bytes)
    few = second_stage(CONFIG, SIZES, Samples(n=10, features=12.0))
    assert few.disk_bytes == 8 * 22 * 10 + few.bytes  # shortlists go when its file is there


def test_the_bytes_of_the_shortlists_are_counted_by_hand():
    found = second_stage(CONFIG, SIZES, SAMPLES)
    model = 3 * 4 * (1000 * 32 + 32 + 64 * 32 + 64) + 3 * 500
    scores = 4 * 8192 * 64 * 3
    lists = model + 2 * scores + scores // 3 + N_THREADS * THREAD_BYTES + 36 * 8192 * 22
    process = PROCESS_BYTES + LATER_BYTES + step_bytes(CONFIG, SIZES, 3, device=CPU)
    assert found.peak_bytes == process + 8 * 12 * 10_000 + lists


def test_the_full_head_and_many_buckets_make_scores_in_chunks():
    K = 10**6
    many = replace(SIZES, n_labels=K, n_buckets=K)
    few = Samples(n=10, features=12.0)
    rest = N_THREADS * THREAD_BYTES + 36 * 10 * 22 + 8 * 120 + PROCESS_BYTES + LATER_BYTES
    full = CONFIG.replace(table="identity", rerank=20)
    step = step_bytes(full, many, 1, device=CPU)
    model = 4 * (1000 * 32 + 32) + (2 * 32 + 4) * K  # the identity table is not held
    assert second_stage(full, many, few).peak_bytes == model + 3 * (4 << 20) + rest + step
    model = 3 * (4 * (1000 * 32 + 32) + 4 * (32 + 1) * K + 4 * K)  # and a table
    scores = 3 * 4 * K * 5  # of five samples, in 64 MiB
    step = step_bytes(CONFIG, many, 3, device=CPU)
    assert second_stage(CONFIG, many, few).peak_bytes == model + 2 * scores + scores // 3 + rest + step


def test_the_bytes_of_the_fit_are_counted_by_hand():
    many, large = (
        Samples(n=10**8, features=12.0),
        Sizes(**{**{n: getattr(SIZES, n) for n in Sizes.__slots__}, "n_features": 10**6}),
    )
    one = second_stage(CONFIG, large, many)
    process = PROCESS_BYTES + LATER_BYTES + step_bytes(CONFIG, large, 3, device=CPU) + 8 * 12 * 10**8
    pairs, weights = 32 << 20, n_weights(large, many)
    copies = N_THREADS * (8 << 20)
    assert one.peak_bytes == process + 4 * (pairs + 10**8 + 2 * N_THREADS * 10**6) + copies + 6 * weights + 12 * 500
    tried = second_stage(CONFIG.replace(rerank_cost="auto"), large, many)
    assert tried.peak_bytes - one.peak_bytes == 6 * weights + 12 * 500  # one more cost, whose weights are kept
    weighed = second_stage(CONFIG.replace(rerank_weight="auto"), large, many)
    kept = 10**8 * (6 * 12 + 4 * 1.5) + 2 * 8 * (10**8 + 1) + 10**8 * 6 * 12  # samples by row, with labels, and by feature
    assert weighed.peak_bytes - one.peak_bytes == 6 * weights + 12 * 500 + kept + 8 * N_THREADS * 10**8


@given(st.integers(0, 10**9), st.floats(0, 10**5), st.floats(0.01, 100))
def test_weights_are_no_more_than_features_of_samples(n, features, labels):
    sizes = replace(SIZES, labels_a_sample=labels)
    weights = n_weights(sizes, Samples(n=n, features=features))
    assert 0 <= weights <= 1 + min(500 * 1000, n * labels * features)
    assert weights <= n_weights(sizes, Samples(n=n + 1, features=features))


@pytest.mark.parametrize(
    ("config", "features"),
    [({"rerank": 0}, "sparse"), ({}, "dense"), ({"loss": "squared-hinge"}, "sparse")],
)
def test_what_has_none_takes_nothing(config, features):
    assert second_stage(CONFIG.replace(**config), replace(SIZES, features=features), SAMPLES) is None


def test_the_estimate_is_near_what_is_written(tiny, tmp_path, monkeypatch):
    sizes, fit = [], rerank_module.fit_margins

    def fitted(*args, **kwargs):
        sizes.append((tmp_path / "run" / rerank_module.SHORTLISTS).stat().st_size)
        return fit(*args, **kwargs)

    monkeypatch.setattr(rerank_module, "fit_margins", fitted)
    monkeypatch.setattr(judge_module, "NETWORKS_FROM", 1)
    monkeypatch.setattr(Judge, "best", lambda self, *given: self.tried(*given)[0][0])  # networks, which hear all
    config = Config(buckets=13, repetitions=2, grouped=0, hidden=8, epochs=2, batch_size=50, precision="float32")
    train(config, tiny, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    found, record = second_stage(config, run.sizes, Samples.of(tiny)), reranker_record(run.path)
    assert Samples.of(tiny).features == tiny.split("train").features.nnz / 200
    assert found.lists_bytes == pytest.approx(sizes[0], rel=0.3)
    written = (
        record["bytes"] - 4 * run.load().reranker.opinions.network.n_parameters
    )  # which are nothing beside the rest elsewhere
    assert record["order"] == "networks" and written / 1.5 < found.bytes < 1.5 * written
