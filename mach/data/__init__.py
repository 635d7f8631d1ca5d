"""Data sets: folders of memory-mapped arrays, made from the files people have."""

from mach.data.csr import CSR, take, take_rows
from mach.data.dataset import Dataset, Split
from mach.data.prepare import prepare
from mach.data.split import split_dev
from mach.data.text import TextVectorizer
from mach.data.twins import Twins, count_twins
from mach.data.writer import write_dataset

__all__ = [
    "CSR", "Dataset", "Split", "TextVectorizer", "Twins", "count_twins", "prepare", "split_dev", "take", "take_rows",
    "write_dataset",
]  # fmt: skip
