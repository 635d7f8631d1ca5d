"""Small real data sets inside the package, ready for `mach prepare`: names of large cities -> the cities, from GeoNames.

mach.prepare(mach.data.bundled.path("places"), "data/places")
"""

from __future__ import annotations

from pathlib import Path

from mach.errors import DataError, nearest

NAMES = ("places",)


def path(name: str) -> Path:
    """Give the folder of a bundled data set, with train.tsv and test.tsv, lines of `text<TAB>label|label`.

    Raises: DataError if no data set has that name.
    """
    if name not in NAMES:
        raise DataError(f"no bundled data set is called '{name}'{nearest(name, NAMES)} (there is: {', '.join(NAMES)})")
    return Path(__file__).parent / name
