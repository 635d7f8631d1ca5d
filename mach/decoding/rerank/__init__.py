"""The second stage: sparse linear weights of each label order the first few decoded labels anew."""

from mach.decoding.rerank.fit import fit_reranker
from mach.decoding.rerank.linear import Reranker
from mach.decoding.rerank.prototypes import add_prototypes, fit_prototypes
from mach.decoding.rerank.weight import DEFAULT_WEIGHT, best_mix

__all__ = ["DEFAULT_WEIGHT", "Reranker", "add_prototypes", "best_mix", "fit_prototypes", "fit_reranker"]
