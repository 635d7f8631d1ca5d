"""The second stage: sparse linear weights of each label order the first few decoded labels anew."""

from mach.decoding.rerank.fit import fit_reranker
from mach.decoding.rerank.linear import Reranker
from mach.decoding.rerank.weight import DEFAULT_WEIGHT, fit_weight

__all__ = ["DEFAULT_WEIGHT", "Reranker", "fit_reranker", "fit_weight"]
