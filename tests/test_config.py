"""Config: every message, the nearest key, the round trip through TOML, the automatic B."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import (
    AUTO,
    HEAD_RATES,
    Config,
    Family,
    HeadOptimizer,
    HeadPrecision,
    Loss,
    Rates,
    TableKind,
    dump_toml,
    load_config,
    read_toml,
)  # fmt: skip
from mach.errors import ConfigError

REALS = {"learning_rate", "input_learning_rate", "weight_decay"}
SHARES = {"dropout": 0.99, "warmup": 1, "validation": 0.9}
REALS_OR_AUTO = {"head_learning_rate", "head_weight_decay"}
configs = st.builds(
    Config,
    table=st.sampled_from(get_args(TableKind)),
    family=st.sampled_from(get_args(Family)),
    loss=st.sampled_from(get_args(Loss)),
    buckets=st.one_of(st.just(AUTO), st.integers(2, 2**62)),
    seed=st.integers(0, 2**63 - 1),
    normalize=st.booleans(),
    layers=st.integers(0, 64),
    **{name: st.one_of(st.integers(0, 9), st.floats(0, 1e30)) for name in REALS},
    head_precision=st.sampled_from(get_args(HeadPrecision)),
    head_optimizer=st.sampled_from(get_args(HeadOptimizer)),
    head_memory=st.integers(0, 1 << 20),
    bottleneck=st.integers(0, 10**6) | st.just("auto"),
    **{name: st.one_of(st.just(AUTO), st.integers(0, 9), st.floats(0, 1e30)) for name in REALS_OR_AUTO},
    **{name: st.one_of(st.just(0), st.floats(0, high)) for name, high in SHARES.items()},
    **{name: st.integers(1, 10**9) for name in ("repetitions", "hidden", "epochs", "batch_size")},
)


@given(configs)
def test_toml_gives_back_the_same_config(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("c") / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert repr(load_config(path)) == repr(config)


def test_toml_is_plain():
    text = dump_toml(Config())
    assert 'loss = "logistic"' in text and "normalize = true" in text
    assert len(text.splitlines()) == len(fields(Config))


@given(configs)
def test_replace_and_dict_keep_everything_else(config):
    assert Config.from_dict(config.to_dict()) == config
    changed = config.replace(hidden=3, loss="squared_hinge")
    assert changed.to_dict() == config.to_dict() | {"hidden": 3, "loss": "squared-hinge"}


@pytest.mark.parametrize("number", [1, 1.0, np.float64(1)])
def test_equal_settings_are_written_alike(number):
    """A run's key is a hash of the settings as text: 1, 1.0 and numpy's 1.0 must not make three ensembles."""
    assert repr(Config(learning_rate=number)) == repr(Config(learning_rate=1.0))
    assert repr(Config(loss=np.str_("softmax"))) == repr(Config(loss="softmax"))
    assert repr(Config(head_weight_decay=number)) == repr(Config(head_weight_decay=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, r"hidden=0 must lie in \[1, inf\]"),
        ({"buckets": 1}, r"buckets=1 must lie in \[2, inf\]"),
        ({"buckets": 2.5}, r"buckets=2\.5 must be int or 'auto'"),
        ({"buckets": "all"}, r"buckets='all' must be int or 'auto'"),
        ({"buckets": True}, r"buckets=True must be int or 'auto'"),
        ({"layers": 65}, r"layers=65 must lie in \[0, 64\]"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in \[0, 0\.99\]"),
        ({"warmup": 1.01}, r"warmup=1\.01 must lie in \[0, 1\]"),
        ({"learning_rate": -1e-9}, r"learning_rate=-1e-09 must lie in \[0, inf\]"),
        ({"learning_rate": math.inf}, r"learning_rate=inf must lie in \[0, inf\]"),
        ({"learning_rate": math.nan}, r"learning_rate=nan must lie in \[0, inf\]"),
        ({"learning_rate": None}, r"learning_rate=None must be float"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 9223372036854775807\]"),
        ({"seed": 2**63}, r"seed=9223372036854775808 must lie in"),
        ({"hidden": "64"}, r"hidden='64' must be int or 'auto'"),
        ({"normalize": 1}, r"normalize=1 must be bool"),
        ({"normalize": "yes"}, r"normalize='yes' must be bool"),
        ({"loss": 3}, r"loss=3 must be 'logistic' or 'softmax' or 'squared-hinge'"),
        (
            {"loss": "softmx"},
            r"loss='softmx' must be one of 'logistic', 'softmax', 'squared-hinge'; did you mean 'softmax'\?",
        ),
        ({"table": "hash"}, r"table='hash' must be one of 'hashed', 'identity'; did you mean 'hashed'\?"),
        (
            {"head_precision": "fp8"},
            r"head_precision='fp8' must be one of 'float32', 'bfloat16', 'float8'",
        ),
        ({"head_optimizer": "adam"}, r"head_optimizer='adam' must be one of 'adamw', 'sgd', 'rowwise-adagrad', 'rowwise-adam'"),
        ({"head_learning_rate": -1}, r"head_learning_rate=-1 must lie in \[0, inf\]"),
        ({"head_learning_rate": "fast"}, r"head_learning_rate='fast' must be float or 'auto'"),
        ({"head_weight_decay": None}, r"head_weight_decay=None must be float or 'auto'"),
        ({"compensated": 1.5, "head_precision": "bfloat16"}, r"compensated=1\.5 must lie in \[0, 1\]"),
        ({"compensated": 0.5}, r"compensated=0\.5 needs head_precision='bfloat16', got 'float32': set that, or compensated=0"),
        ({"compensated": 0.5, "head_precision": "float8"}, r"compensated=0\.5 needs head_precision='bfloat16', got 'float8'"),
        ({"precision": "fp8"}, r"precision='fp8' must be one of 'auto', 'bfloat16', 'float32', 'float8'"),
        (
            {"precision": "float8"},
            r"precision='float8' needs head_precision='float8', got 'float32': set that, or precision='auto'",
        ),
        ({"precision": "float8", "table": "identity"}, r"precision='float8' needs head_precision='float8', got 'bfloat16'"),
        (
            {"input_precision": "float8", "head_precision": "float8"},
            r"input_precision='float8' must be one of 'auto', 'bfloat16'",
        ),
        ({"bottleneck": -1}, r"bottleneck=-1 must lie in \[0, inf\]"),
        ({"bottleneck": 2.5}, r"bottleneck=2\.5 must be int"),
        ({"head_batch_size": -1}, r"head_batch_size=-1 must lie in \[0, inf\]"),
        ({"head_batch_size": 300}, r"head_batch_size=300 must be 0, or lie in \[1, 256\], the batch_size"),
        ({"head_memory": 2**21}, r"head_memory=2097152 must lie in \[0, 1048576\]"),
        ({"family": "md5"}, r"family='md5' must be one of 'carter-wegman', 'multiply-shift', 'xxhash'$"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("bucket", "; did you mean 'buckets'?"), ("learningrate", "; did you mean 'learning_rate'?"), ("zz", "")],
)
def test_an_unknown_key_gets_the_nearest(key, suggestion):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"hidden": 8, key: 1}, where="a.toml")
    known = ", ".join(f.name for f in fields(Config))
    assert str(caught.value) == f"a.toml: unknown key '{key}'{suggestion} (known: {known})"


def test_underscores_in_values_are_hyphens():
    config = Config.from_dict({"loss": "squared_hinge", "family": "multiply_shift"})
    assert (config.loss, config.family) == ("squared-hinge", "multiply-shift")


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        Config().hidden = 3


@given(st.integers(2, 2**40))
def test_automatic_buckets_are_the_power_of_two_nearest_to_8_sqrt_k(n_labels):
    buckets, wish = Config().n_buckets(n_labels), 8 * math.sqrt(n_labels)
    assert 2 <= buckets <= n_labels
    if buckets < n_labels:
        assert buckets & (buckets - 1) == 0
        assert wish / math.sqrt(2) * (1 - 1e-12) <= buckets <= wish * math.sqrt(2) * (1 + 1e-12)
    else:
        assert wish * math.sqrt(2) > n_labels
    more = min(n_labels, 4 * buckets) if n_labels <= 4 * 4 * buckets else -(-n_labels // 2)  # which is up to 16,384
    assert Config().n_buckets(n_labels, 1.499) == (more if n_labels <= 10**6 else buckets)


@pytest.mark.parametrize(
    ("n_samples", "n_outputs", "labels", "rate"),
    [
        (50_000, 1_024, 15.65, 0.004), (100, 2_048, 5.12, 0.004), (50_000, 6_400, 5, 0.00125), (50_000, 10**6, 2, 0.001),
        (100_000, 1_024, 15.65, 0.002), (100_000, 6_400, 5, 0.00125), (10**9, 1_024, 15.65, 0.001),
    ],
)  # fmt: skip
def test_automatic_step_sizes_are_smaller_where_outputs_are_rarely_positive_or_samples_many(n_samples, n_outputs, labels, rate):
    assert Config().rates(n_samples, 9 * n_outputs, n_outputs, labels) == Rates(
        pytest.approx(rate), pytest.approx(15 * rate), pytest.approx(rate)
    )
    full = max(0.002, rate)
    assert Config(table="identity").rates(n_samples, 9 * n_outputs, n_outputs, labels) == Rates(
        *(pytest.approx(x) for x in (full, 15 * full, full))
    )
    assert Config(head_optimizer="rowwise-adam").rates(n_samples, 9 * n_outputs, n_outputs, labels).head == pytest.approx(full)
    few = round(n_outputs / labels)
    one_label = Config().rates(n_samples, 8 * few, few, 1)
    assert one_label.head == pytest.approx(full, rel=1e-3)
    assert Config(learning_rate=1, head_optimizer="sgd").rates(n_samples, 9 * n_outputs, n_outputs, labels) == Rates(
        1, pytest.approx(15 * rate), 3
    )
    assert Config(input_learning_rate=2, head_learning_rate=0.5).rates(n_samples, 9 * n_outputs, n_outputs, labels) == Rates(
        pytest.approx(rate), 2, 0.5
    )


def test_the_hidden_vector_is_narrower_where_samples_are_few():
    """Not that of a full head, whose one encoder has to know everything."""
    assert [Config().n_hidden(n) for n in (1, 49_999, 50_000, 10**9)] == [256, 256, 512, 512]
    assert [Config(table="identity").n_hidden(n) for n in (1, 10**9)] == [512, 512]
    assert [Config(hidden=8, table=table).n_hidden(n) for table in ("hashed", "identity") for n in (1, 10**9)] == [8] * 4


def test_a_share_is_dropped_where_samples_are_few():
    assert [Config().share_dropped(n) for n in (1, 49_999, 50_000, 10**9)] == [0.3, 0.3, 0, 0]
    assert [Config(dropout=share).share_dropped(n) for share in (0, 0.5) for n in (1, 10**9)] == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("n_labels", "labels", "share"),
    [(10, 1.0, 1.0), (10, 1.999, 1.0), (10, 2.0, 0.0), (1_000_000, 1.0, 1.0), (1_000_001, 1.0, 0.0)],
)
def test_buckets_are_learnt_where_a_sample_has_about_one_label(n_labels, labels, share):
    assert Config().share_grouped(n_labels, labels) == share
    assert [Config(grouped=given).share_grouped(n_labels, labels) for given in (0, 0.25)] == [0, 0.25]
    assert (
        Config(table="identity").share_grouped(n_labels, labels) == Config(table="identity", grouped=1).share_grouped(10, 1) == 0
    )


@pytest.mark.parametrize(
    ("n_samples", "n_outputs", "labels", "epochs"),
    [
        (4_880, 128, 2.38, 6),  # few samples
        (20_770, 2_048, 11.18, 5),
        (36_796, 1_024, 15.65, 3),
        (103_509, 2_048, 1.68, 6),  # few positives an output
        (1, 2, 0, 6),
        (10**7, 8_192, 5, 3),
    ],
)
def test_automatic_epochs_are_more_where_there_is_little_to_see(n_samples, n_outputs, labels, epochs):
    assert Config().n_epochs(n_samples, n_outputs, labels) == epochs
    assert Config(epochs=1).n_epochs(n_samples, n_outputs, labels) == 1


@pytest.mark.parametrize(("n_labels", "buckets"), [(2, 2), (64, 64), (100, 64), (4271, 512), (235_000, 4096), (3_000_000, 16384)])
def test_automatic_buckets_are_frozen(n_labels, buckets):
    assert Config().n_buckets(n_labels) == buckets


def test_buckets_given_or_of_the_full_head():
    assert Config(buckets=7).n_buckets(7) == 7
    assert Config(table="identity", buckets=7, repetitions=5).n_buckets(1000) == 1000
    assert Config(table="identity", buckets=7).n_buckets(1000, 1.0) == 1000
    assert Config(buckets=7).n_buckets(1000, 1.0) == 7
    with pytest.raises(ConfigError, match=r"buckets=8 must lie in \[2, 7\], the number of labels of this data set"):
        Config(buckets=8).n_buckets(7)


@pytest.mark.parametrize(
    ("settings", "n_labels", "labels", "repetitions"),
    [
        ({}, 235_000, 1.5, 8),
        ({"buckets": 16_384}, 235_000, 1.5, 8),  # more are better there, whatever they cost
        ({}, 235_000, 1.499, 2),
        ({}, 1_000_001, 1.499, 8),  # whose look-alikes are not learnt
        ({}, 5783, 1.499, 2),  # of 2,048 buckets, as many in all as 8 of 512
        ({"buckets": 1024}, 5783, 1.0, 4),
        ({"buckets": 4096}, 58_727, 1.0, 8),
        ({"buckets": 64}, 58_727, 1.0, 8),
        ({"buckets": 50_000}, 58_727, 1.0, 2),  # one cannot tell the labels of a bucket apart
        ({}, 3, 1.0, 8),
        ({"repetitions": 5}, 235_000, 1.0, 5),
        ({"repetitions": 5, "table": "identity"}, 235_000, 2.0, 1),
        ({"table": "identity"}, 235_000, 1.0, 1),
    ],
)
def test_repetitions_are_fewer_of_more_buckets_where_a_sample_has_about_one_label(settings, n_labels, labels, repetitions):
    assert Config(**settings).n_repetitions(n_labels, labels) == repetitions


@pytest.mark.parametrize(
    ("settings", "n_labels", "n_outputs", "labels", "width"),
    [
        ({}, 58_727, 29_364, 1.499, 64),
        ({}, 58_727, 29_363, 1.499, 0), ({}, 58_727, 29_364, 1.5, 0), ({}, 58_727, 58_727, 1, 64),
        ({}, 5783, 5783, 1, 0), ({}, 16_384, 16_384, 1, 0), ({}, 1_000_000, 500_000, 1, 64), ({}, 1_000_002, 500_001, 1, 0),
        ({"table": "identity"}, 58_727, 58_727, 1, 0), ({"table": "identity", "bottleneck": 7}, 58_727, 58_727, 1, 7),
        ({"bottleneck": 0}, 58_727, 29_364, 1, 0), ({"bottleneck": 7}, 9, 9, 5, 7),
    ],
)  # fmt: skip
def test_a_bottleneck_is_narrow_where_a_sample_has_about_one_of_many_labels(settings, n_labels, n_outputs, labels, width):
    assert Config(**settings).n_bottleneck(n_labels, n_outputs, labels, 65) == width
    assert Config(**settings).n_bottleneck(n_labels, n_outputs, labels, 64) == (0 if width == 64 else width)


@pytest.mark.parametrize(("n_labels", "n_buckets"), [(58_727, 29_364), (234_908, 117_454)])
def test_the_settings_where_a_sample_has_about_one_of_many_labels(n_labels, n_buckets):
    """As measured in experiments/accuracy/buckets."""
    config = Config()
    assert (config.n_buckets(n_labels, 1.14), config.n_repetitions(n_labels, 1.14)) == (n_buckets, 2)
    assert (config.n_bottleneck(n_labels, n_buckets, 1.14, 512), config.head_rule(n_labels, n_buckets, 1.14)) == (
        64,
        "rowwise-adam",
    )
    assert config.rates(240_000, n_labels, n_buckets, 1.14) == Rates(0.002, 0.03, 0.002)


def test_the_head_learns_row_by_row_where_a_sample_has_about_one_label_and_a_bucket_few():
    rules = [Config().head_rule(n_labels, 100, labels) for n_labels, labels in ((800, 1), (800, 1.499), (801, 1), (800, 1.5))]
    assert rules == ["rowwise-adam"] * 2 + ["adamw"] * 2
    assert [Config(table="identity").head_rule(9, 9, labels) for labels in (1, 9)] == ["rowwise-adam"] * 2
    assert [Config(head_optimizer="sgd", table=table).head_rule(9, 9, 1) for table in ("hashed", "identity")] == ["sgd"] * 2


def test_the_heads_rate_and_decay_are_its_own_or_follow():
    assert (Config(learning_rate=0.5).rates(99, 99, 9, 1).head, Config(weight_decay=0.25).head_decay()) == (0.5, 0.25)
    assert (
        Config(head_learning_rate=0).rates(99, 99, 9, 1).head == 0
        and Config(weight_decay=0.25, head_weight_decay=0).head_decay() == 0
    )
    for kind in set(get_args(HeadOptimizer)) - {"adamw"}:
        assert Config(head_optimizer=kind, learning_rate=0.5).rates(99, 99, 9, 1).head == HEAD_RATES.get(kind, 0.5)
        assert Config(head_optimizer=kind, head_learning_rate=3).rates(99, 99, 9, 1).head == 3


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        read_toml(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    for content in (b"hidden = ", b"\xff = 1"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml: is not TOML: "):
            read_toml(path)
    path.write_text("hiden = 4")
    with pytest.raises(ConfigError, match=r"bad\.toml: unknown key 'hiden'; did you mean 'hidden'\?"):
        load_config(path)


def test_who_has_a_second_stage():
    assert [Config(**one).n_reranked("sparse") for one in ({}, {"loss": "softmax"}, {"table": "identity"})] == [20, 20, 20]
    assert Config().n_reranked("dense") == Config(loss="squared-hinge").n_reranked("sparse") == 0
    assert Config(table="identity", loss="squared-hinge", rerank=5).n_reranked("sparse") == 5


def test_a_few_of_many_samples_are_held_out_for_the_second_stage_alone():
    auto = Config()
    assert [auto.n_held_out(n, "sparse") for n in (9_999, 10_000, 79_999, 240_000, 10**9)] == [0, 250, 1999, 6000, 6000]
    assert auto.n_held_out(10**6, "dense") == 0
    assert auto.replace(rerank=0).n_held_out(10**6, "sparse") == 0 < auto.replace(table="identity").n_held_out(10**6, "sparse")
    assert auto.replace(validation=0).n_held_out(10**6, "sparse") == 0
    assert auto.replace(validation=0.25, rerank=0).n_held_out(1000, "dense") == 250
