"""The bundled data set: there, readable, small, and what the script makes."""

from __future__ import annotations

import pytest

from mach.data import bundled
from mach.errors import DataError


def read(split):
    lines = (bundled.path("places") / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    return [(name, labels.split("|")) for name, labels in (line.split("\t") for line in lines)]


def test_it_holds_what_its_readme_says():
    train, test = read("train"), read("test")
    assert (len(train), len(test), len({label for _, labels in train for label in labels})) == (8276, 1950, 199)
    readme = (bundled.path("places") / "README.md").read_text(encoding="utf-8")
    assert "8,276 names" in readme and "1,950" in readme and "CC BY 4.0" in readme


def test_test_asks_only_for_labels_of_train_by_unseen_names():
    train, test = read("train"), read("test")
    assert {label for _, labels in test for label in labels} <= {label for _, labels in train for label in labels}
    assert not {name.casefold() for name, _ in train} & {name.casefold() for name, _ in test}


def test_it_stays_small():
    assert sum(file.stat().st_size for file in bundled.path("places").iterdir()) < 300_000


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(DataError, match=r"no bundled data set is called 'place'; did you mean 'places'\? \(there is: places\)"):
        bundled.path("place")
