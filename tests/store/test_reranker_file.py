"""A re-ranker on disk that another takes the place of while it is read."""

from __future__ import annotations

import numpy as np
import pytest

from mach.decoding.rerank import Reranker
from mach.errors import ModelError
from mach.store import reranker as store
from mach.store.reranker import load_reranker, save_reranker


def one(weight: float, n: int) -> Reranker:
    return Reranker(
        np.array([0, n, n]), np.arange(n, dtype=np.int32), np.full(n, 16256, np.uint16), np.zeros(2, np.float32), 50, 5, weight
    )


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
