"""The head's own settings through the whole of training: they learn, resume to the same bits, and count as they are stored."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mach.config import Config
from mach.decoding import decode_topk
from mach.errors import ModelError
from mach.hashing.bounds import ensemble_cost
from mach.heads import LinearHead, Rule, rule_of
from mach.heads.rounding import FLOAT8
from mach.metrics import precision_at_k
from mach.model import INPUT, Packed, Sizes, initial_parameters
from mach.parallel import train
from mach.parallel.plan import disk_bytes
from mach.store import Run, load
from mach.store.folder import sizes_of, table_of
from mach.train import group as groups
from mach.train.checkpoint import checkpoint_path
from mach.train.finite import is_finite
from mach.train.loop import Group

CPU = torch.device("cpu")
CONFIG = Config(
    buckets=16,
    repetitions=2,
    grouped=0,
    hidden=32,
    dropout=0.1,
    batch_size=16,
    epochs=20,
    learning_rate=0.02,
    input_learning_rate=0.03,
)
SOLVING = {"adamw": 0.02, "sgd": 1.0, "rowwise-adagrad": 0.1, "rowwise-adam": 0.02}
CASES = [
    {"head_precision": "bfloat16", "head_optimizer": "rowwise-adam", "compensated": 0.3, "bottleneck": 6, "head_batch_size": 7},
    {"head_precision": "float8", "head_optimizer": "sgd", "head_learning_rate": 1, "head_batch_size": 16},
    {"head_precision": "bfloat16", "table": "identity", "head_memory": 1},
    {"head_precision": "float8", "head_optimizer": "rowwise-adagrad", "precision": "bfloat16", "patience": 3},
    {"head_precision": "float8", "precision": "float8", "head_batch_size": 7},
    {"head_precision": "float8", "precision": "float8", "table": "identity", "bottleneck": 6, "loss": "softmax"},
]


def group_of(config, dataset):
    sizes = sizes_of(config, dataset)
    numbers = range(config.n_repetitions(sizes.n_labels, sizes.labels_a_sample))
    return Group(config, dataset, sizes, table_of(config, sizes, numbers, dataset.label_names), CPU)


@pytest.mark.parametrize("products", ["auto", "float8"])
@pytest.mark.parametrize(("kind", "precision"), list(product(SOLVING, ["float32", "bfloat16", "float8"])))
def test_the_planted_problem_is_solved_by_every_rule_in_every_storage(tiny, kind, precision, products):
    if products == "float8" != precision:
        pytest.skip("outputs in float8 are for weights in float8")
    config = CONFIG.replace(
        table="identity", head_optimizer=kind, head_learning_rate=SOLVING[kind], head_precision=precision, bottleneck=24,
        precision=products,
    )  # fmt: skip
    group = group_of(config, tiny)
    assert group.packed.head.in_float8 == (products == "float8")
    for _ in group.steps(lambda r: None):
        pass
    test = tiny.split("test")
    outputs = group.packed.logits(group._batch(test.features)).numpy()
    found = decode_topk(outputs, group.table, 5, loss="logistic", estimator="logits").labels
    assert precision_at_k(found, test.labels, 1) >= 0.9


@pytest.mark.parametrize("settings", CASES)
def test_a_stopped_run_resumes_to_the_same_bits_and_is_read_back(tiny, tmp_path, monkeypatch, settings):
    config = CONFIG.replace(epochs=3, **settings)
    train(config, tiny, tmp_path / "whole")
    steps, step = [], groups.Group._step

    def stopped(self, ready, want_loss):
        steps.append(self.step)
        if len(steps) == 17:
            raise KeyboardInterrupt
        return step(self, ready, want_loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(groups.Group, "_step", stopped)
        train(config, tiny, tmp_path / "cut", checkpoint_s=0)
    numbers, sizes = Run.open(tmp_path / "whole").finished(), sizes_of(config, tiny)
    rule = config.head_rule(sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample)
    with safe_open(checkpoint_path(tmp_path / "cut", numbers), framework="pt") as file:
        names = set(file.keys())
    assert ("optimizer.head.weight.lost" in names) == ("compensated" in settings)
    assert ("optimizer.head.weight.second" in names) == (rule != "sgd")
    assert ("optimizer.head.weight.first" in names) == (rule == "adamw")
    model = train(config, tiny, tmp_path / "cut", resume=True)
    stored = {"bfloat16": torch.bfloat16, "float8": FLOAT8}[config.head_storage()]
    for r in numbers:
        whole, cut = (load_file(Run.open(tmp_path / name).weights_path(r)) for name in ("whole", "cut"))
        assert all(torch.equal(whole[name].view(torch.uint8), cut[name].view(torch.uint8)) for name in whole)
        assert cut["head.weight"].dtype == stored and cut["head.weight"].shape[1] == settings.get("bottleneck", config.hidden)
        assert {cut[name].dtype for name in cut if name not in ("head.weight", INPUT)} == {torch.float32}
    features = tiny.split("test").features
    again = load(tmp_path / "cut", device="cpu")
    assert again.config == config.replace(repetitions=len(numbers))
    np.testing.assert_array_equal(again.bucket_logits(features), model.bucket_logits(features))


SETTINGS = [
    {"head_optimizer": kind, "head_precision": precision, "bottleneck": bottleneck, "compensated": share}
    for kind, precision, bottleneck, share in product(SOLVING, ["float32", "bfloat16", "float8"], [0, 5], [0, 0.33])
    if precision == "bfloat16" or not share
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_what_is_held_is_what_was_counted(tiny, settings):
    config = CONFIG.replace(layers=1, **settings)
    group = group_of(config, tiny)
    width = group.packed.parameters[INPUT].itemsize
    cost = ensemble_cost(
        n_labels=40, n_buckets=16, n_repetitions=2, hidden=32, n_features=50, layers=1, settings=config, input_bytes=width
    )
    assert sum(x.nbytes for x in group.tensors().values()) == cost.training_bytes - cost.table_bytes
    weights = [group.packed.repetition(r) for r in range(2)]
    assert sum(x.nbytes for each in weights for x in each.values()) == cost.weight_bytes
    assert sum(x.numel() for each in weights for x in each.values()) == cost.parameters
    written = 3 * cost.weight_bytes + 2 * (cost.training_bytes - cost.table_bytes - cost.weight_bytes)
    assert disk_bytes(config, group.sizes, [[0, 1]], n_workers=1, input_bytes=width) == written


def test_the_encoder_is_as_it_was_where_only_the_heads_rate_is_zero(tiny):
    """The head's step size is its own: at zero nothing of the head moves, and all else does."""
    group = group_of(CONFIG.replace(head_learning_rate=0, bottleneck=5, head_optimizer="rowwise-adam"), tiny)
    before = {name: value.clone() for name, value in group.packed.parameters.items()}
    next(group.steps(lambda r: None))
    moved = {name for name, value in group.packed.parameters.items() if not torch.equal(value, before[name])}
    assert moved == {"input.weight", "input.bias", "bottleneck.weight"}


@pytest.mark.parametrize(("batch", "head_batch"), [(16, 0), (16, 16), (16, 7), (300, 64)])
def test_each_step_of_the_head_has_the_next_number_and_the_rule(tiny, monkeypatch, batch, head_batch):
    group, seen, sizes, step = (
        group_of(CONFIG.replace(epochs=2, batch_size=batch, head_batch_size=head_batch), tiny),
        [],
        [],
        LinearHead.step,
    )

    def noted(self, hidden, positives, *, update, **how):
        seen.append(rule_of(update))
        sizes.append(hidden.shape[1])
        return step(self, hidden, positives, update=update, **how)

    monkeypatch.setattr(LinearHead, "step", noted)
    records = list(group.steps(lambda r: None))
    assert all(isinstance(rule, Rule) and rule.repetitions == (0, 1) for rule in seen)
    assert [rule.step for rule in seen] == list(range(1, len(seen) + 1)) and group.head_steps == len(seen)
    assert sum(sizes) == 2 * 200 and max(sizes) == min(head_batch or batch, batch, 200)
    assert {rule.rate for rule in seen} == {record.rate for record in records}


def test_initial_weights_are_those_of_float32_rounded(monkeypatch):
    """Drawn in runs, they are the numbers of one drawing."""
    monkeypatch.setattr("mach.heads.shard.DRAWN", 48)
    sizes = Sizes(n_features=7, n_labels=30, n_buckets=30, hidden=32, features="sparse", labels_a_sample=1.0)
    drawn = {}
    for precision in ("float32", "bfloat16", "float8"):
        generator = torch.Generator().manual_seed(5)
        drawn[precision] = initial_parameters(CONFIG.replace(head_precision=precision), sizes, generator, torch.float32)[
            "head.weight"
        ]
    assert torch.equal(drawn["bfloat16"], drawn["float32"].bfloat16())
    assert torch.equal(drawn["float8"].view(torch.uint8), (drawn["float32"] * 32).to(FLOAT8).view(torch.uint8))


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
def test_a_nan_in_float8_is_found(bad):
    stored = torch.arange(256, dtype=torch.uint8)
    stored[[0x7F, 0xFF]] = 0
    assert is_finite(stored.view(FLOAT8))
    stored[17] = bad
    assert not is_finite(stored.view(FLOAT8))


def test_absurd_steps_of_the_head_are_named(tiny):
    config = CONFIG.replace(head_optimizer="sgd", head_learning_rate=1e38, normalize=False, warmup=0, precision="float32")
    with pytest.raises(
        ModelError, match=r"smaller steps than learning_rate=[\d.]+, input_learning_rate=[\d.]+, head_learning_rate=1e\+38 or"
    ):
        list(group_of(config, tiny).steps(lambda r: None))


def test_a_chunk_of_the_head_is_bounded_by_its_setting():
    parameters = {name: torch.zeros(shape) for name, shape in (("input.weight", (5, 1, 4)), ("input.bias", (1, 4)))}
    parameters |= {"head.weight": torch.zeros(1, 3, 4), "head.bias": torch.zeros(1, 3)}
    given = [Packed(parameters, config=CONFIG.replace(head_memory=MiB), features="sparse").head.chunk_bytes for MiB in (0, 3)]
    assert given == [64 << 20, 3 << 20]
