"""Encoders: a batch of features -> one hidden vector a sample and repetition, R repetitions packed."""

from mach.encoders.bottleneck import Bottleneck
from mach.encoders.dropout import Dropout
from mach.encoders.inputs import DenseBatch, DenseInput, Input, SparseBatch, SparseInput, input_for, make_batch
from mach.encoders.mlp import MLP

__all__ = [
    "MLP", "Bottleneck", "DenseBatch", "DenseInput", "Dropout", "Input", "SparseBatch", "SparseInput", "input_for", "make_batch",
]  # fmt: skip
