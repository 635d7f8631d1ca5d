"""The second stage: what is known of each label alone orders the first few decoded labels anew."""

from mach.decoding.rerank.choose import best_of, ndcg
from mach.decoding.rerank.fit import fit_margins
from mach.decoding.rerank.linear import SparseWeights
from mach.decoding.rerank.nearest import Nearest
from mach.decoding.rerank.network import Network, fit_network, sum_of
from mach.decoding.rerank.prototypes import fit_prototypes
from mach.decoding.rerank.reranker import DEFAULT_WEIGHT, Opinions, Reranker, hear

__all__ = [
    "DEFAULT_WEIGHT", "Nearest", "Network", "Opinions", "Reranker", "SparseWeights", "best_of", "fit_margins", "fit_network",
    "fit_prototypes", "hear", "ndcg", "sum_of",
]  # fmt: skip
