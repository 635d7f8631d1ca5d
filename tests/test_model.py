"""The model: initial weights, shapes of answers, subsets, and what is refused."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import mach
from mach import model as model_module
from mach.config import Config, Estimator, Loss
from mach.data import CSR
from mach.errors import ConfigError, DataError, MachError, ModelError
from mach.hashing import LabelTable
from mach.model import Model, Packed, Sizes, feature_buckets, initial_parameters, prior_output, resolve_device, resolve_precision
from mach.parallel import train

CONFIG = Config(buckets=13, repetitions=3, hidden=9, batch_size=50, epochs=2, rerank=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tiny):
    return mach.train(CONFIG, tiny, device="cpu")


@pytest.fixture(scope="module")
def trained_dense(tiny_dense):
    return mach.train(CONFIG, tiny_dense, device="cpu")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model trained on a few texts."""
    at = tmp_path_factory.mktemp("text")
    lines = [f"{city} {city} town\t{city}\n" for city in ("paris", "rome", "oslo", "lima") for _ in range(3)]
    (at / "train.tsv").write_text("".join(lines))
    return mach.train(CONFIG.replace(buckets=2), mach.prepare(at / "train.tsv", at / "data", hash_bits=10), device="cpu")


def all_alike(model, given, k=7):
    """Ask for the same samples in every form and see the same bits."""
    found = [model.predict_topk(X, k) for X in given]
    for other in found[1:]:
        assert np.array_equal(found[0].labels, other.labels) and np.array_equal(found[0].scores, other.scores)
    return found[0]


def test_every_form_of_features_gives_one_answer(trained, trained_dense, tiny):
    X = tiny.split("test").features
    forms = [
        X.to_scipy(),
        X,
        sp.csr_matrix(X.to_scipy()),
        X.to_scipy().tocsc(),
        X.to_scipy().toarray(),
        X.to_scipy().toarray().tolist(),
    ]
    for model in (trained, trained_dense):
        top = all_alike(model, forms)
        assert top.labels.shape == top.scores.shape == (60, 7)
        assert top.labels.dtype == np.int64 and top.scores.dtype == np.float32
        assert (np.diff(top.scores, axis=1) <= 0).all()
        assert all(len(set(row)) == 7 for row in top.labels.tolist())
    assert np.array_equal(X.values, tiny.split("test").features.values)  # what was given is left as it is


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_every_estimator_answers(trained, tiny, estimator):
    assert trained.predict_topk(tiny.split("test").features, 3, estimator=estimator).labels.shape == (60, 3)


def test_all_labels_can_be_asked_for(trained, tiny):
    top = trained.predict_topk(tiny.split("test").features, 40)
    assert all(sorted(row) == list(range(40)) for row in top.labels.tolist())


@pytest.mark.parametrize("k", [0, -1, 41])
def test_k_is_checked_also_without_samples(trained, tiny, k):
    for X in (tiny.split("test").features, np.empty((0, 50))):
        with pytest.raises(ConfigError, match=rf"k={k} must lie in \[1, 40\], the number of labels"):
            trained.predict_topk(X, k)


def test_no_samples_give_no_answers(trained, trained_dense):
    for model in (trained, trained_dense):
        for X in (np.empty((0, 50), np.float32), sp.csr_array((0, 50), dtype=np.float32)):
            top = model.predict_topk(X, 4)
            assert (top.labels.shape, top.scores.shape) == ((0, 4), (0, 4))


def test_a_sample_without_features_gets_an_answer(trained):
    top = all_alike(trained, [np.zeros((2, 50)), sp.csr_array((2, 50))])
    assert np.isfinite(top.scores).all()


def test_chunks_of_samples_change_nothing_that_shows(trained, tiny, monkeypatch):
    X = tiny.split("test").features
    whole = trained.predict_topk(X, 5)
    monkeypatch.setattr(model_module, "SCORE_BYTES", 4 * 3 * 13 * 7)
    assert [len(rows) for rows in trained.row_chunks(X)] == [7] * 8 + [4]
    in_parts = trained.predict_topk(X, 5)
    assert np.array_equal(whole.labels, in_parts.labels)
    np.testing.assert_allclose(whole.scores, in_parts.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["logits", "mean", "min"])
def test_a_choice_of_labels_is_that_of_brute_force(trained, tiny, monkeypatch, estimator):
    """Also where samples are decoded a few at a time."""
    X, rng = tiny.split("test").features, np.random.default_rng(0)
    subset, without = rng.choice(40, 25, replace=False), [rng.choice(40, rng.integers(0, 12)) for _ in range(60)]
    every = trained.predict_topk(X, 40, estimator=estimator)
    monkeypatch.setattr(model_module, "SCORE_BYTES", 4 * 3 * 13 * 7)

    def brute(allowed, lists, k):
        kept = [[i for i, label in enumerate(row) if label in allowed and label not in out] for row, out in
                zip(every.labels.tolist(), lists, strict=True)]  # fmt: skip
        return [every.labels[n, places[:k]].tolist() for n, places in enumerate(kept)]

    def labels(**only):
        return trained.predict_topk(X, 5, estimator=estimator, **only).labels.tolist()

    assert labels(restrict=subset) == brute(subset, [[]] * 60, 5)
    assert labels(exclude=without) == brute(range(40), without, 5)
    assert labels(restrict=subset, exclude=without) == brute(subset, without, 5)


def test_a_choice_that_cannot_be_names_the_sample(trained, tiny, monkeypatch):
    monkeypatch.setattr(model_module, "SCORE_BYTES", 4 * 3 * 13 * 7)
    X, without = tiny.split("test").features, [[] for _ in range(60)]
    with pytest.raises(ConfigError, match="exclude holds 59 lists of labels, but there are 60 samples: give one each"):
        trained.predict_topk(X, 5, exclude=without[:-1])
    with pytest.raises(ConfigError, match=r"exclude\[33\]: labels must lie in \[0, 40\), got 40..40"):
        trained.predict_topk(X, 5, exclude=[*without[:33], [40], *without[34:]])
    with pytest.raises(ConfigError, match="k=5 is above the 4 labels that sample 33 is left with"):
        trained.predict_topk(X, 5, exclude=[*without[:33], range(36), *without[34:]])
    with pytest.raises(ConfigError, match=r"k=5 must lie in \[1, 2\], the number of different labels in restrict"):
        trained.predict_topk(X, 5, restrict=[1, 1, 2])


def test_another_number_of_features_is_named(trained, trained_dense):
    for model in (trained, trained_dense):
        for X in (np.zeros((2, 49)), sp.csr_array((2, 49)), CSR.from_scipy(sp.csr_array((2, 49)))):
            with pytest.raises(DataError, match="the samples have 49 features, the model was trained on 50"):
                model.predict_topk(X)


@pytest.mark.parametrize(
    "X", [np.zeros(50), np.zeros((2, 3, 50)), [0.0] * 50, 3.0, None], ids=["1d", "3d", "list", "number", "none"]
)
def test_what_is_no_matrix_is_refused(trained, trained_dense, X):
    for model in (trained, trained_dense):
        with pytest.raises(DataError, match="matrix of features"):
            model.predict_topk(X)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_values_that_are_not_finite_are_refused(trained, trained_dense, bad):
    X = np.zeros((3, 50), np.float32)
    X[1, 4] = bad
    for model in (trained, trained_dense):
        with pytest.raises(MachError, match=r"sample 1 holds a value that is not a finite number"):
            model.predict_topk(X)


def test_text_for_a_model_of_features_is_refused(trained):
    for X in ("Paris", ["Paris", "Rome"]):
        with pytest.raises(DataError, match="the model was trained on features, not on text: give a matrix of features"):
            trained.predict_topk(X)


def test_text_is_asked_alone_or_in_any_sequence(asked):
    texts = ["oslo town", "lima"]
    top = all_alike(asked, [texts, tuple(texts), np.array(texts), asked.vectorizer.transform(texts)], k=4)
    assert np.array_equal(asked.predict_topk("oslo town", 4).labels, top.labels[:1])
    assert asked.predict_topk([], 4).labels.shape == (0, 4)
    assert sorted(asked.name_of(k) for k in range(4)) == ["lima", "oslo", "paris", "rome"]


def test_a_subset_of_repetitions_is_the_ensemble_of_those(trained, tiny):
    X = tiny.split("test").features
    part = trained.select([2, 0])
    assert part.table.repetitions == (2, 0) and len(part.repetitions) == 2
    assert np.array_equal(part.bucket_logits(X), trained.bucket_logits(X)[:, [2, 0]])
    assert np.array_equal(part.select([0]).predict_topk(X, 5).scores, trained.select([0]).predict_topk(X, 5).scores)
    with pytest.raises(ConfigError, match=r"repetition 3 is not in this table, which holds \[0, 1, 2\]"):
        trained.select([3])
    with pytest.raises(ModelError, match="2 repetitions do not fit a table of 3"):
        Model(config=CONFIG, sizes=trained.sizes, table=trained.table, repetitions=trained.repetitions[:2], device=CPU)


def test_the_sum_of_logits_is_what_the_buckets_say(trained, tiny):
    """score(k) = sum_r z_r[h_r(k)], in float64 loops from the raw outputs."""
    X = tiny.split("test").features
    logits, table = trained.bucket_logits(X).astype(float), trained.table.array()
    scores_NK = sum(logits[:, r, table[r].astype(int)] for r in range(3))
    top = trained.predict_topk(X, 40, estimator="logits")
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores_NK, top.labels, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top.scores, -np.sort(-scores_NK, axis=1), rtol=1e-5, atol=1e-5)


def test_packed_and_single_give_the_same_outputs():
    sizes = Sizes(n_features=6, n_labels=20, n_buckets=5, hidden=4, features="dense", labels_a_sample=1.0)
    config = Config(hidden=4, layers=1)
    each = [initial_parameters(config, sizes, torch.Generator().manual_seed(r), torch.float64) for r in range(3)]
    X = model_module.make_batch(np.random.default_rng(0).normal(size=(7, 6)), normalize=True, device=CPU, dtype=torch.float64)
    together = Packed.join(iter(each), 3, config=config, features="dense", device=CPU).logits(X)
    for r in range(3):
        alone = Packed.single(each[r], config=config, features="dense").logits(X)
        torch.testing.assert_close(together[:, r : r + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_a_lone_repetition_is_packed_and_handed_out_without_a_copy(largest, n):
    """As the full head is, whose weights are most of what its training takes."""
    sizes = Sizes(n_features=6, n_labels=9, n_buckets=5, hidden=4, features="sparse", labels_a_sample=1.0)
    config = Config(hidden=4)
    drawn = [initial_parameters(config, sizes, torch.Generator().manual_seed(r), torch.float32) for r in range(n)]
    with largest:
        packed = Packed.join(iter(drawn), n, config=config, features="sparse", device=CPU)
        given = packed.repetition(0)
    assert (largest.n_elements == 0) == (n == 1)
    for name, value in drawn[0].items():
        assert torch.equal(given[name], value) and given[name].shape == value.shape
        assert packed.parameters[name].is_contiguous() and (given[name].data_ptr() == value.data_ptr()) == (n == 1)


def test_initial_weights_are_frozen():
    """Repetitions added later, elsewhere, must begin as if they had been trained here."""
    sizes = Sizes(n_features=3, n_labels=8, n_buckets=4, hidden=2, features="sparse", labels_a_sample=0.4)
    found = initial_parameters(Config(hidden=2, layers=1), sizes, torch.Generator().manual_seed(1), torch.float32)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "input.weight": (3, 2), "input.bias": (2,), "layers.0.weight": (2, 2), "layers.0.bias": (2,),
        "head.weight": (4, 2), "head.bias": (4,),
    }  # fmt: skip
    golden = {"input.weight": -0.016613023, "layers.0.weight": -0.19906922, "head.weight": -0.36111942}
    assert {name: found[name].flatten()[-1].item() for name in golden} == pytest.approx(golden, rel=1e-6)
    assert not found["input.bias"].any() and not found["layers.0.bias"].any()


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.4, 0.9])
def test_the_head_begins_where_the_expected_loss_is_least(loss, share):
    """At z the derivative of share * loss(positive) + (1 - share) * loss(negative) is zero; shares end at one half."""
    z, p = prior_output(loss, share), min(share, 0.5)
    if loss == "logistic":
        assert 1 / (1 + math.exp(-z)) == pytest.approx(p)
    elif loss == "squared-hinge":
        assert -2 * p * max(0, 1 - z) + 2 * (1 - p) * max(0, 1 + z) == pytest.approx(0, abs=1e-12)
    else:
        assert z == 0.0
    assert math.isfinite(prior_output(loss, 0.0)) and math.isfinite(prior_output(loss, 1e9))


def test_devices_are_resolved_or_refused():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda", "cuda:", "cuda:-1", "cpu:0", ""):
        with pytest.raises(ConfigError, match=rf"device='{name}' must be 'auto', 'cpu' or 'cuda:i'"):
            resolve_device(name)
    with pytest.raises(ConfigError, match=r"device='cuda:64': this machine has \d+ CUDA devices"):
        resolve_device("cuda:64")


def test_features_are_hashed_the_same_in_training_and_prediction(tiny, tmp_path):
    config = CONFIG.replace(feature_buckets=30, epochs=12, precision="float32")
    model = train(config, tiny, tmp_path / "run")
    X = tiny.split("test").features
    logits = model.bucket_logits(X)
    packed = Packed.join((each.repetition(0) for each in model.repetitions), 3, config=config, features="sparse", device=CPU)
    rows = feature_buckets(config, model.sizes, (0, 1, 2))
    batch = model_module.make_batch(X, normalize=True, device=CPU, buckets_RF=rows)
    np.testing.assert_allclose(packed.logits(batch).numpy(), logits, rtol=1e-4, atol=1e-5)
    part = model.select([2, 0])
    np.testing.assert_array_equal(part.bucket_logits(X), logits[:, [2, 0]])
    assert model.repetitions[0].parameters["input.weight"].shape == (30, 1, config.hidden)


def test_the_hash_of_features_is_frozen_and_not_that_of_labels():
    sizes = Sizes(n_features=1000, n_labels=1000, n_buckets=64, hidden=512, features="sparse", labels_a_sample=1.0)
    found = feature_buckets(Config(feature_buckets=64), sizes, (0, 5))
    assert found[:, [0, 1, 999]].tolist() == [[16, 0, 7], [29, 15, 3]]
    labels = LabelTable.hashed(1000, 64, repetitions=(0, 5)).array()
    assert (found == labels).mean() < 0.1


@pytest.mark.parametrize(
    ("features", "n", "allowed"),
    [("sparse", 1, r"0, or lie in \[2, 6\], the features"), ("sparse", 7, r"0, or lie in \[2, 6\]"), ("dense", 3, "0 for dense")],
)
def test_features_that_cannot_be_hashed_are_refused(features, n, allowed):
    sizes = Sizes(n_features=6, n_labels=20, n_buckets=5, hidden=512, features=features, labels_a_sample=1.0)
    with pytest.raises(ConfigError, match=f"feature_buckets={n} must be {allowed}"):
        feature_buckets(Config(feature_buckets=n), sizes, (0,))


def test_the_type_of_the_products(monkeypatch):
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", bool)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert resolve_precision("auto", CPU) == resolve_precision("float8", CPU) == dtype
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_precision("auto", CPU) == torch.float32  # an older torch cannot tell
