"""The second stage: what is known of each label alone orders the first few decoded labels anew."""

from mach.decoding.rerank.choose import best_of, ndcg
from mach.decoding.rerank.fit import fit_margins
from mach.decoding.rerank.linear import SparseWeights
from mach.decoding.rerank.nearest import Nearest
from mach.decoding.rerank.neighbours import Neighbours
from mach.decoding.rerank.network import Network, fit_network, sum_of
from mach.decoding.rerank.prototypes import fit_prototypes
from mach.decoding.rerank.reranker import DEFAULT_WEIGHT, N_OPINIONS, Evidence, Opinions, Reranker, hear, look_around

__all__ = [
    "DEFAULT_WEIGHT",
    "N_OPINIONS",
    "Evidence",
    "Nearest",
    "Neighbours",
    "Network",
    "Opinions",
    "Reranker",
    "SparseWeights",
    "best_of",
    "fit_margins",
    "fit_network",
    "fit_prototypes",
    "hear",
    "look_around",
    "ndcg",
    "sum_of",
]  # fmt: skip
