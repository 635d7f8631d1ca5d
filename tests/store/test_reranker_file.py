"""A re-ranker on disk: what is kept of it, and one that another takes the place of while it is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mach.data import CSR
from mach.decoding.rerank import N_OPINIONS, Evidence, Neighbours, Opinions, Reranker, SparseWeights, fit_network, sum_of
from mach.errors import ModelError
from mach.store import reranker as store
from mach.store.reranker import load_reranker, reranker_record, save_reranker


def one(weight: float, n: int) -> Reranker:
    bits, bias = np.full(n, 16256, np.uint16), np.zeros(2, np.float32)
    return Reranker(SparseWeights(np.array([0, n, n]), np.arange(n, dtype=np.int32), bits, bias, 50), 5, weight)


def test_all_parts_come_back(tmp_path):
    rng = np.random.default_rng(0)
    network, _ = fit_network(
        rng.normal(size=(20, 3, N_OPINIONS)).astype(np.float32), np.ones((20, 3), bool), rng.random((20, 3)) < 0.3
    )
    plain, counts, a_sum = one(1.5, 3), np.array([4, 0], np.int32), sum_of((1, 2, 3, *[0] * (N_OPINIONS - 3)))
    labels = CSR(np.array([0, 2, 3]), np.array([0, 1, 1], np.int32), None, 2)
    neighbours = Neighbours(one(1.0, 7).weights, labels)
    for saved in (
        plain,
        dataclasses.replace(plain, opinions=Opinions(Evidence(one(1.0, 5).weights, counts, neighbours), network, 9)),
        dataclasses.replace(plain, opinions=Opinions(Evidence(one(1.0, 0).weights, counts, None), a_sum, 0)),
    ):
        save_reranker(tmp_path, "key", saved, {})
        found, record = load_reranker(tmp_path, "key"), reranker_record(tmp_path)
        assert found.key == saved.key and (found.depth, found.weight) == (5, 1.5)
        assert record["near"] == (saved.opinions.n_near if saved.opinions else 0)
        assert record["parameters"] == found.n_parameters == saved.n_parameters


def test_networks_of_another_version_are_refused(tmp_path):
    counts = np.array([4, 0], np.int32)
    old = dataclasses.replace(one(1.5, 3), opinions=Opinions(Evidence(one(1.0, 5).weights, counts, None), sum_of((1, 2, 3)), 0))
    save_reranker(tmp_path, "key", old, {})
    with pytest.raises(ModelError, match=r"hears 3 numbers of a label, this version 11; fit it again with `mach rerank`"):
        load_reranker(tmp_path, "key")


@pytest.mark.parametrize("n", [3, 40])  # of the same size as the first, and of another
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_one_that_took_its_place_is_read(tmp_path, monkeypatch, n, when):
    save_reranker(tmp_path, "key", one(1.0, 3), {})
    real, calls = store.load_file, []

    def swapped(path):
        calls.append(path)
        mapped = real(path) if when == "after" else None
        if len(calls) == 1:
            save_reranker(tmp_path, "key", one(2.0, n), {})
        return real(path) if mapped is None else mapped

    monkeypatch.setattr(store, "load_file", swapped)
    found = load_reranker(tmp_path, "key")
    assert (found.key, len(calls)) == (one(2.0, n).key, 2)


def test_a_record_that_is_no_longer_there_is_not_held_against_the_weights(tmp_path, monkeypatch):
    save_reranker(tmp_path, "key", one(1.0, 3), {})
    stale, real = [store.reranker_record(tmp_path)], store.reranker_record
    save_reranker(tmp_path, "key", one(2.0, 40), {})
    monkeypatch.setattr(store, "reranker_record", lambda folder: stale.pop() if stale else real(folder))
    assert load_reranker(tmp_path, "key").key == one(2.0, 40).key


def test_one_cut_short_meanwhile_is_named_and_one_deleted_is_none(tmp_path, monkeypatch):
    save_reranker(tmp_path, "key", one(1.0, 3), {})
    weights = tmp_path / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is cut short or changed"):
        load_reranker(tmp_path, "key")
    save_reranker(tmp_path, "key", one(1.0, 3), {})
    real = store.load_file
    monkeypatch.setattr(store, "load_file", lambda path: (tmp_path / store.RECORD).unlink() or real(path))
    assert load_reranker(tmp_path, "key") is None
