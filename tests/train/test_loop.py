"""The training loop: against a slow truth, alone and packed, on a problem that must be solved, with validation."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from train_reference import train_reference

from mach.config import Config, Loss
from mach.data import Dataset, write_dataset
from mach.decoding import decode_topk
from mach.errors import DataError
from mach.hashing import LabelTable
from mach.metrics import precision_at_k
from mach.model import Packed, feature_buckets
from mach.store.folder import sizes_of, table_of
from mach.train.loop import LOSS_EVERY, VALIDATION_SAMPLES, Group, held_out_rows
from mach.train.schedule import order_of

CPU = torch.device("cpu")
LOSSES = get_args(Loss)
SMALL = Config(buckets=16, repetitions=3, hidden=16, dropout=0.0, batch_size=32, epochs=2, learning_rate=0.01)
SOLVING = SMALL.replace(hidden=32, epochs=20, batch_size=16, learning_rate=0.02, input_learning_rate=0.03, repetitions=6)


def group_of(config, dataset, repetitions=None, dtype=torch.float32):
    sizes = sizes_of(config, dataset)
    numbers = repetitions if repetitions is not None else range(config.n_repetitions(sizes.n_labels, sizes.labels_a_sample))
    return Group(config, dataset, sizes, table_of(config, sizes, numbers, dataset.label_names), CPU, dtype)


def run(group, on_better=lambda r: None):
    return list(group.steps(on_better))


def without_dev(dataset, path):
    return write_dataset(path, {"train": (dataset.split("train").features.to_scipy(), dataset.split("train").labels.to_scipy())})


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"table": "identity", "loss": "logistic"},
        {"table": "identity", "loss": "softmax", "layers": 2, "weight_decay": 0.1},
        {"table": "identity", "loss": "squared-hinge", "normalize": False, "input_learning_rate": 0.003},
        {"loss": "logistic", "layers": 1, "dropout": 0.3},
        {"loss": "logistic", "dropout": 0.001},
        {"loss": "softmax", "dropout": "auto"},
        {"loss": "softmax", "family": "multiply-shift"},
        {"loss": "squared-hinge", "layers": 1},
        {"table": "identity", "head_optimizer": "sgd", "head_learning_rate": 0.5, "weight_decay": 0.1, "head_batch_size": 13},
        {"head_optimizer": "rowwise-adam", "head_weight_decay": 0.1, "bottleneck": 5, "loss": "softmax", "dropout": 0.3},
        {"head_optimizer": "rowwise-adagrad", "bottleneck": 20, "layers": 1, "head_batch_size": 8, "loss": "squared-hinge"},
        {"head_learning_rate": 0.03, "head_batch_size": 31},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_run_equals_plain_autograd_in_float64(tiny, tiny_dense, settings, dense):
    dataset = tiny_dense if dense else tiny
    config = SMALL.replace(**settings)
    group = group_of(config, dataset, dtype=torch.float64)
    records = run(group)
    X, Y = tiny.split("train").features.to_scipy().toarray(), tiny.split("train").labels.to_scipy().toarray()
    all_losses = []
    for r, number in enumerate(group.repetitions):
        table_K = group.table.array()[r].astype(int)
        touched = np.ones_like(X, bool) if dense else X != 0
        truth, losses = train_reference(config, group.sizes, X.astype(float), Y, table_K, number, group.n_steps, touched)
        found = group.packed.repetition(r)
        assert found.keys() == truth.keys()
        for name in truth:
            np.testing.assert_allclose(found[name].numpy(), truth[name], rtol=1e-9, atol=1e-9, err_msg=name)
        all_losses.append(losses)
    noted = {record.step: record.loss for record in records if record.loss is not None}
    assert list(noted) == [1, group.n_steps]
    for step, loss in noted.items():
        assert loss == pytest.approx(np.mean([losses[step - 1] for losses in all_losses]), rel=1e-9)


@pytest.mark.parametrize("normalize", [True, False])
def test_hashed_features_equal_plain_autograd_over_the_hashed_matrix(tiny, normalize):
    config = SMALL.replace(feature_buckets=11, normalize=normalize, dropout=0.3)
    group = group_of(config, tiny, dtype=torch.float64)
    run(group)
    X, Y = tiny.split("train").features.to_scipy().toarray(), tiny.split("train").labels.to_scipy().toarray()
    norms = np.sqrt((X.astype(float) ** 2).sum(1, keepdims=True))
    X_NF = X / np.where(norms > 0, norms, 1) if normalize else X.astype(float)
    tables = feature_buckets(config, group.sizes, group.repetitions)
    assert tables.shape == (len(group.repetitions), X.shape[1]) and len({tuple(row) for row in tables.tolist()}) > 1
    for r, number in enumerate(group.repetitions):
        onto = np.eye(11)[tables[r]]  # (F, 11)
        table_K = group.table.array()[r].astype(int)
        how = config.replace(normalize=False)
        truth, _ = train_reference(how, group.sizes, X_NF @ onto, Y, table_K, number, group.n_steps, (X != 0) @ onto > 0)
        found = group.packed.repetition(r)
        for name in truth:
            np.testing.assert_allclose(found[name].numpy(), truth[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("table", ["hashed", "identity"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_planted_problem_is_solved(tiny, table, loss):
    group = group_of(SOLVING.replace(table=table, loss=loss), tiny)
    records = run(group)
    test = tiny.split("test")
    logits = group.packed.logits(group._batch(test.features)).numpy()
    found = decode_topk(logits, group.table, 5, loss=loss, estimator="logits").labels
    assert precision_at_k(found, test.labels, 1) >= 0.9
    losses = [r.loss for r in records if r.loss is not None]
    assert losses[-1] < losses[0] / 3


def test_dense_features_solve_it_too(tiny_dense):
    group = group_of(SOLVING, tiny_dense)
    run(group)
    test = tiny_dense.split("test")
    found = decode_topk(
        group.packed.logits(group._batch(test.features)).numpy(), group.table, 5, loss="logistic", estimator="mean"
    )
    assert precision_at_k(found.labels, test.labels, 1) >= 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_packed_and_alone_agree_to_rounding(tiny, dropout):
    """The products of R repetitions may be summed in another order than those of one: float64 shows that this is all."""
    config = SMALL.replace(dropout=dropout, layers=1)
    together = group_of(config, tiny, dtype=torch.float64)
    run(together)
    for r in range(3):
        alone = group_of(config, tiny, [r], dtype=torch.float64)
        run(alone)
        for name, value in alone.packed.repetition(0).items():
            torch.testing.assert_close(value, together.packed.repetition(r)[name], rtol=1e-9, atol=1e-11)


def test_repetitions_differ_and_their_number_decides(tiny):
    first, later = group_of(SMALL, tiny, [0, 1]), group_of(SMALL, tiny, [1, 7])
    a0, a1, b1 = first.packed.repetition(0), first.packed.repetition(1), later.packed.repetition(0)
    assert not torch.equal(a0["input.weight"], a1["input.weight"])
    for name, value in a1.items():
        assert torch.equal(value, b1[name])
    assert np.array_equal(first.table.array()[1], later.table.array()[0])


def test_another_seed_is_another_model(tiny):
    a, b = (group_of(SMALL.replace(seed=seed), tiny).packed.repetition(0)["head.weight"] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_global_random_state_is_neither_read_nor_changed(tiny):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.random.get_rng_state()
    a = group_of(SMALL.replace(dropout=0.5), tiny)
    run(a)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    b = group_of(SMALL.replace(dropout=0.5), tiny)
    run(b)
    for name, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[name])


def test_a_record_a_step(tiny):
    config = SMALL.replace(batch_size=7, epochs=3)
    records = run(group_of(config, tiny))
    n = 3 * 29  # 200 samples in batches of 7
    assert [r.step for r in records] == list(range(1, n + 1)) and {r.n_steps for r in records} == {n}
    assert [r.epoch for r in records] == [e for e in (1, 2, 3) for _ in range(29)]
    assert [r.step for r in records if r.loss is not None] == [*range(1, n, LOSS_EVERY), n]
    assert [r.step for r in records if r.validation] == [29, 58, 87]
    assert all(r.samples_per_s > 0 for r in records)
    assert all((r.peak_bytes is None) == (r.loss is None) for r in records)
    assert records[0].peak_bytes > 1 << 20
    assert max(r.rate for r in records) == config.learning_rate and records[-1].rate < 0.01 * config.learning_rate


def test_each_epoch_visits_every_sample_once(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Group, "_step", lambda self, ready, want_loss: (seen.append(ready.rows), setattr(self, "step", self.step + 1))[0]
    )
    group = group_of(SMALL.replace(batch_size=64), tiny)
    run(group)
    assert [len(rows) for rows in seen] == [64, 64, 64, 8] * 2
    for epoch in (0, 1):
        assert np.concatenate(seen[4 * epoch : 4 * epoch + 4]).tolist() == order_of(200, 0, epoch).tolist()


def test_validation_measures_the_group_decoded_together(tiny):
    group = group_of(SOLVING.replace(epochs=4), tiny)
    record = run(group)[-1]
    dev = tiny.split("dev")
    found = decode_topk(
        group.packed.logits(group._batch(dev.features)).numpy(), group.table, 5, loss="logistic", estimator="logits"
    )
    assert record.validation == {f"P@{k}": pytest.approx(precision_at_k(found.labels, dev.labels, k)) for k in (1, 3, 5)}


def test_standings_count_right_best_buckets(tiny):
    group = group_of(SOLVING.replace(epochs=1), tiny)
    run(group)
    dev = tiny.split("dev")
    labels_NK = dev.labels.to_scipy().toarray() > 0
    outputs = group.packed.logits(group._batch(dev.features))
    for r, standing in enumerate(group.standings):
        best = outputs[:, r].argmax(1).numpy()
        right = [group.table.array()[r][labels].tolist() for labels in (np.flatnonzero(row) for row in labels_NK)]
        assert standing.best == pytest.approx(np.mean([b in buckets for b, buckets in zip(best, right, strict=True)]))


def test_early_stopping_stops_each_repetition_by_itself(tiny, monkeypatch):
    """Repetition 0 is best at its 2nd epoch, repetition 1 at its 4th; with patience 2 the group ends after epoch 6."""
    scripted = iter([(0.1, 0.1), (0.5, 0.2), (0.5, 0.3), (0.4, 0.4), (0.9, 0.4), (0.9, 0.1), (1.0, 1.0)])
    judge = Group._judge
    monkeypatch.setattr(Group, "_judge", lambda self, right, on_better: judge(self, np.array(next(scripted)), on_better))
    group = group_of(SMALL.replace(patience=2, epochs=50), tiny, [0, 1])
    better = []
    records = run(group, lambda r: better.append((r, group.step // group.steps_per_epoch)))
    assert better == [(0, 1), (1, 1), (0, 2), (1, 2), (1, 3), (1, 4)]
    assert records[-1].epoch == 6 and group.done
    assert [(s.best, s.epochs_since, s.stopped) for s in group.standings] == [(0.5, 2, True), (0.4, 2, True)]


def test_without_patience_nothing_stops(tiny, monkeypatch):
    judge = Group._judge
    monkeypatch.setattr(Group, "_judge", lambda self, right, on_better: judge(self, 0 * right, on_better))
    group = group_of(SMALL.replace(epochs=4), tiny)
    assert len(run(group)) == group.n_steps


def test_samples_are_held_out_where_there_is_no_dev_split(tiny, tmp_path):
    dataset = without_dev(tiny, tmp_path / "d")
    group = group_of(SMALL.replace(validation=0.25), dataset)
    assert (group.n_samples, group.n_held, len(group.held_out[1])) == (150, 50, 50)
    held = order_of(200, 0, -1)[:50]
    assert held_out_rows(group.config, dataset).tolist() == sorted(held.tolist())
    assert not len(held_out_rows(group.config, tiny)) and not len(held_out_rows(SMALL, dataset))
    for epoch in (0, 1):
        assert sorted([*group.rows_at(epoch, np.arange(150)).tolist(), *held.tolist()]) == list(range(200))
    assert group_of(SMALL, dataset).held_out is None
    with_dev = group_of(SMALL.replace(validation=0.25), tiny)
    assert (with_dev.n_samples, with_dev.n_held, len(with_dev.held_out[1])) == (200, 0, 40)


def test_a_large_dev_split_is_sampled(tmp_path):
    n = VALIDATION_SAMPLES + 500
    X, Y = sp.random_array((n, 5), density=0.5, rng=np.random.default_rng(0), dtype=np.float32), sp.eye_array(n, 4, format="csr")
    dataset = write_dataset(tmp_path / "d", {"train": (X.tocsr()[:50], Y[:50]), "dev": (X, Y)})
    group = group_of(SMALL.replace(buckets=2), dataset)
    assert len(group.held_out[1]) == VALIDATION_SAMPLES


def test_nothing_to_train_on_or_to_stop_by_is_named(tiny, tmp_path):
    dataset = without_dev(tiny, tmp_path / "d")
    with pytest.raises(DataError, match=r"d: patience=3 needs a dev split, or validation above 0"):
        group_of(SMALL.replace(patience=3), dataset)
    X, Y = sp.csr_array(np.ones((1, 2), np.float32)), sp.csr_array(np.ones((1, 3), np.float32))
    one = write_dataset(tmp_path / "one", {"train": (X, Y)})
    with pytest.raises(DataError, match=r"one: the train split has no samples to train on"):
        group_of(SMALL.replace(validation=0.9, buckets=2), one)
    only_test = write_dataset(tmp_path / "test", {"test": (X, Y)})
    with pytest.raises(DataError, match=r"has no split 'train'; there are: test"):
        group_of(SMALL.replace(buckets=2), only_test)


def test_rows_without_features_or_labels_are_legal(tmp_path):
    X, Y = np.zeros((6, 4), np.float32), np.zeros((6, 3), np.float32)
    X[0, 1] = Y[0, 0] = Y[1, 2] = X[2, 3] = 1  # then: labels without features, features without labels, and three of nothing
    dataset = write_dataset(
        tmp_path / "d", {"train": (sp.csr_array(X), sp.csr_array(Y)), "dev": (sp.csr_array(X), sp.csr_array(Y))}
    )
    for loss in LOSSES:
        group = group_of(SMALL.replace(buckets=2, loss=loss, batch_size=2), dataset)
        records = run(group)
        assert all(np.isfinite(r.loss) for r in records if r.loss is not None)
        assert all(value.isfinite().all() for value in group.tensors().values())


def test_two_labels_in_one_bucket_are_one_positive(tmp_path):
    X, Y = sp.csr_array(np.ones((1, 2), np.float32)), sp.csr_array(np.ones((1, 6), np.float32))
    dataset = write_dataset(tmp_path / "d", {"train": (X, Y)})
    config = SMALL.replace(buckets=2, epochs=1, loss="softmax")
    record = run(group_of(config, Dataset.open(dataset.path), dtype=torch.float64))[-1]
    assert record.loss >= np.log(2) - 1e-12  # both buckets are positive and share the mass: no less than ln 2


def test_join_and_single_keep_each_repetition():
    rng = np.random.default_rng(0)
    each = [{"input.weight": torch.from_numpy(rng.normal(size=(4, 3))), "input.bias": torch.from_numpy(rng.normal(size=3)),
             "head.weight": torch.from_numpy(rng.normal(size=(5, 3))), "head.bias": torch.from_numpy(rng.normal(size=5))}
            for _ in range(2)]  # fmt: skip
    packed = Packed.join(iter(each), 2, config=SMALL, features="sparse", device=CPU)
    assert {name: tuple(v.shape) for name, v in packed.parameters.items()} == {
        "input.weight": (4, 2, 3), "input.bias": (2, 3), "head.weight": (2, 5, 3), "head.bias": (2, 5),
    }  # fmt: skip
    for r in range(2):
        for name, value in packed.repetition(r).items():
            assert torch.equal(value, each[r][name]) and value.is_contiguous()


def test_the_table_of_the_full_head_is_the_identity(tiny):
    config = SMALL.replace(table="identity")
    assert table_of(config, sizes_of(config, tiny), [0], None) == LabelTable.identity(40)
