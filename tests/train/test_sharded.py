"""A full head on several ranks: the weights, losses and validation of one process, whatever the cut; and the bytes it sends."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mach.comm import Alone, lengths_of, part_of
from mach.config import Config, Loss
from mach.errors import ConfigError
from mach.heads import LinearHead, linear, shard
from mach.model import initial_parameters
from mach.parallel.comm import CountingComm
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group
from mach.train.sharded import ShardedGroup
from mach.train.traffic import step_bytes

CPU = torch.device("cpu")
LOSSES = get_args(Loss)
SMALL = Config(table="identity", hidden=16, dropout=0.3, batch_size=33, epochs=2, learning_rate=0.01)  # 200 samples: 33 * 6 + 2


def group_of(config, dataset, comm=None, dtype=torch.float64):
    sizes = sizes_of(config, dataset)
    table = table_of(config, sizes, [0], None)
    return (
        Group(config, dataset, sizes, table, CPU, dtype)
        if comm is None
        else ShardedGroup(config, dataset, sizes, table, CPU, comm, dtype)
    )


def trained(config, dataset, comm=None, dtype=torch.float64):
    """Train, and give the tensors (whole), the losses and the validations."""
    group = group_of(config, dataset, comm, dtype)
    records = list(group.steps(lambda r: None))
    return group.tensors(), [r.loss for r in records if r.loss is not None], [r.validation for r in records if r.validation]


def joined(each):
    """Put the tensors of all ranks together; what each has whole must have the same bits on all."""
    whole = {}
    for name, first in each[0].items():
        if name.removeprefix("optimizer.").startswith("head."):
            whole[name] = torch.cat([tensors[name] for tensors in each], 1)
        else:
            assert all(torch.equal(tensors[name], first) for tensors in each), name
            whole[name] = first
    return whole


def assert_like_one(ranks, size, config, dataset, tolerance=1e-9, dtype=torch.float64):
    truth, losses, validations = trained(config, dataset, dtype=dtype)
    results = ranks(size, lambda comm: trained(config, dataset, comm, dtype))
    found = joined([tensors for tensors, _, _ in results])
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name].double(), truth[name].double(), rtol=tolerance, atol=tolerance, msg=name)
    for _, ours, seen in results:
        assert ours == pytest.approx(losses, rel=tolerance) and len(ours) >= 2
        assert seen == validations and len(seen) == config.epochs


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_give_the_weights_of_one_process(ranks, tiny, loss, size):
    assert_like_one(ranks, size, SMALL.replace(loss=loss), tiny)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 2, "weight_decay": 0.1},
        {"layers": 1, "dropout": 0.0, "loss": "softmax"},
        {"feature_buckets": 11, "normalize": False},
        {"batch_size": 199},  # the last batch: one sample
        {"bottleneck": 5, "head_optimizer": "sgd", "head_learning_rate": 1.0},
        {"head_batch_size": 8, "loss": "softmax", "head_optimizer": "rowwise-adam"},
        {
            "precision": "float8",
            "head_precision": "float8",
            "head_optimizer": "sgd",
            "head_learning_rate": 1.0,
            "loss": "softmax",
        },
        {"bottleneck": 3, "head_batch_size": 16, "head_optimizer": "rowwise-adagrad", "layers": 1},
    ],
    ids=str,
)
def test_other_settings_too(ranks, tiny, changes):
    assert_like_one(ranks, 3, SMALL.replace(**changes), tiny)


def test_dense_features_too(ranks, tiny_dense):
    assert_like_one(ranks, 3, SMALL, tiny_dense)


def test_more_chunks_than_are_late(ranks, tiny, monkeypatch):
    three = 3 * linear.bucket_bytes(33, 16, products=torch.float64)
    monkeypatch.setitem(linear.CHUNK_BYTES, "cpu", three)
    assert_like_one(ranks, 2, SMALL.replace(loss="softmax"), tiny)


def test_as_many_ranks_as_labels(ranks, tiny):
    assert_like_one(ranks, 40, SMALL.replace(epochs=1), tiny)


def test_float32_and_bfloat16_stay_near(ranks, tiny):
    wide = SMALL.replace(dropout=0.0, precision="float32", head_precision="float32")
    assert_like_one(ranks, 2, wide, tiny, 1e-3, torch.float32)
    losses = ranks(2, lambda comm: trained(SMALL.replace(precision="bfloat16"), tiny, comm, torch.float32)[1])
    assert losses[0] == losses[1] == pytest.approx(trained(SMALL, tiny)[1], rel=0.05)


def test_weights_in_bfloat16_are_rounded_by_their_place_in_the_whole_head(ranks, tiny):
    config = SMALL.replace(head_precision="bfloat16", head_optimizer="sgd", dropout=0.0, epochs=1, precision="float32")
    found = joined([tensors for tensors, _, _ in ranks(3, lambda comm: trained(config, tiny, comm, torch.float32))])
    whole, other = (trained(config.replace(seed=seed), tiny, dtype=torch.float32)[0]["head.weight"] for seed in (0, 1))
    assert found["head.weight"].dtype == torch.bfloat16
    alike = (found["head.weight"] == whole).float().mean()
    assert alike > 0.95 > 0.5 > (found["head.weight"] == other).float().mean()  # but where sums in another order round


def test_compensation_is_refused(ranks, tiny):
    config = SMALL.replace(head_precision="bfloat16", compensated=0.5)
    with pytest.raises(ConfigError, match=r"^compensated=0.5 is for one process, not 2: choose compensated=0$"):
        ranks(2, lambda comm: group_of(config, tiny, comm))


def test_more_ranks_than_labels_are_refused(ranks, tiny):
    with pytest.raises(ConfigError, match=r"^41 processes: there must be at most 40, the labels of this data set$"):
        ranks(41, lambda comm: group_of(SMALL, tiny, comm))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_parts_follow_each_other_and_are_near_equal(n, size):
    parts = [part_of(n, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert lengths_of(n, size) == [len(part) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.data())
def test_a_shard_draws_the_weights_that_the_whole_head_has(B, D, seed, data):
    start = data.draw(st.integers(0, B))
    rows = range(start, data.draw(st.integers(start, B)))
    whole, part = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    drawn, shard.DRAWN = shard.DRAWN, 16 * data.draw(st.integers(1, 5))
    try:
        found = shard.normal_rows((B, D), rows, part)
    finally:
        shard.DRAWN = drawn
    assert torch.equal(found, torch.randn(B, D, generator=whole)[rows.start : rows.stop])
    assert torch.equal(torch.randn(20, generator=whole), torch.randn(20, generator=part))


def test_a_shard_is_drawn_in_memory_of_its_own_size(tiny, largest, monkeypatch):
    monkeypatch.setattr(shard, "DRAWN", 64)
    with largest:
        found = initial_parameters(
            SMALL, sizes_of(SMALL, tiny), torch.Generator().manual_seed(0), torch.float32, None, range(30, 33)
        )
    assert found["head.weight"].shape == (3, 16) and found["head.bias"].shape == (3,)
    assert largest.n_elements == 50 * 16  # the input layer's


def test_the_gradient_is_told_complete_before_the_last_chunks_are_updated():
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (torch.randn(shape, generator=generator) for shape in ((1, 9, 4), (1, 9), (1, 3, 4)))
    events = []
    none = torch.zeros(0, dtype=torch.int64)
    positives = linear.Positives(none, none, none, torch.zeros(1, 3, dtype=torch.int64))
    two = 2 * linear.bucket_bytes(3, 4, products=torch.float32)
    head = LinearHead(weight, bias, chunk_bytes=two)
    gradient, _ = head.step(
        hidden, positives, loss="logistic", want_loss=False,
        update=lambda name, part, value, copy: events.append((name, part.start)),
        tell_gradient=lambda gradient: events.append(gradient.clone()),
    )  # fmt: skip
    told = [i for i, event in enumerate(events) if isinstance(event, torch.Tensor)]
    assert told == [6] and torch.equal(events.pop(6), gradient)
    assert events == [(name, start) for start in range(0, 9, 2) for name in ("head.weight", "head.bias")]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "loss": "softmax"},
        {"loss": "softmax", "precision": "bfloat16"},
        {"bottleneck": 5, "head_optimizer": "sgd"},
    ],
    ids=str,
)
def test_the_bytes_of_a_step_are_those_predicted(ranks, tiny, changes, size):
    config = SMALL.replace(epochs=1, **changes)
    product_bytes = 2 if config.precision == "bfloat16" else 4

    def count(comm):
        comm = CountingComm(comm)
        group = group_of(config.replace(precision=config.precision.replace("auto", "float32")), tiny, comm, torch.float32)
        for record in group.steps(lambda r: None):
            if not record.validation:  # which sends, too
                yield record, dict(comm.sent)
            comm.sent.clear()

    for rank, steps in enumerate(ranks(size, lambda comm: list(count(comm)))):
        assert len(steps) == 6
        for record, sent in steps:
            parts = step_bytes(config, 16, 33, rank, size, want_loss=record.loss is not None, product_bytes=product_bytes)
            gathered = ("hidden vectors", "log-sum-exp", "gradient of z")
            assert sent["all_gather"] == sum(parts[name] for name in gathered)
            assert sent["reduce_scatter"] == parts["their gradient"] and sent["all_reduce"] == parts["dense gradients"]
            assert (sum(parts.values()) > 0) == (size > 1)


def test_who_is_alone_gets_back_what_it_gives():
    comm, value = Alone(), torch.arange(3)
    assert (comm.rank, comm.size, comm.broadcast({"a": 1})) == (0, 1, {"a": 1})
    comm.barrier()
    for pending in (comm.all_gather(value, [3]), comm.reduce_scatter(value, [3]), comm.all_reduce(value, "max")):
        assert pending.wait() is value
