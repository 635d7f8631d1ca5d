"""What a step of a large head takes beyond weights and hidden vectors: counted allocation by allocation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mach.heads import LinearHead, Positives, Rule
from mach.heads.linear import bucket_bytes
from mach.heads.rounding import narrow
from mach.train.optim import Optimizer

K, D, N = 200_000, 64, 32


def peak_of(work):
    """Give the most bytes that torch held on the CPU during a call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


def problem(precision, kind, products):
    torch.manual_seed(0)
    parameters = {"head.weight": narrow(torch.randn(1, K, D) / 8, precision), "head.bias": torch.full((1, K), -6.0)}
    rule = Rule(kind=kind, rate=0.01, weight_decay=0.01, step=0, seed=1, repetitions=(0,))
    optimizer = Optimizer(parameters, weight_decay=0.0, row_wise="input.weight", head=rule)
    labels = np.sort(np.random.default_rng(0).choice(K, (N, 5)), 1).astype(np.int32)
    positives = Positives.of([(np.arange(0, 5 * N + 1, 5), labels.ravel())], torch.device("cpu"))
    return parameters, optimizer, torch.randn(1, N, D).to(products), positives


@pytest.mark.parametrize("loss", ["logistic", "softmax", "squared-hinge"])
@pytest.mark.parametrize(
    ("precision", "kind", "products"),
    [
        ("float32", "adamw", torch.float32), ("float32", "sgd", torch.float32), ("bfloat16", "rowwise-adam", torch.bfloat16),
        ("bfloat16", "sgd", torch.float32), ("float8", "sgd", torch.bfloat16), ("float8", "adamw", torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("MiB", [8])
def test_a_step_takes_its_budget_and_the_gradient_of_the_hidden_vectors(precision, kind, products, loss, MiB):
    parameters, optimizer, hidden, positives = problem(precision, kind, products)
    head = LinearHead(parameters["head.weight"], parameters["head.bias"], chunk_bytes=MiB << 20)
    optimizer.begin_step(rate=0.0, row_rate=0.0, head_rate=0.01)
    update = optimizer.begin_head(optimizer.update)
    peak = peak_of(lambda: head.step(hidden, positives, loss=loss, update=update, want_loss=True))
    n_chunks = -(-K // ((MiB << 20) // bucket_bytes(N, D, products=products)))
    of_hidden = 4 * N * D * 4  # their gradient, a chunk's part of it, the vectors over N
    small = (64 << 10) + 8 * N * n_chunks * (loss == "softmax")  # biases, positives, one number a chunk and sample
    assert (MiB << 20) / 3 < peak <= (MiB << 20) * 1.1 + of_hidden + small
    assert peak < K * D  # not one more array of the head's size, of any type


def test_a_budget_of_the_default_holds_a_head_of_any_size():
    parameters, optimizer, hidden, positives = problem("bfloat16", "sgd", torch.bfloat16)
    head = LinearHead(parameters["head.weight"], parameters["head.bias"])
    optimizer.begin_step(rate=0.0, row_rate=0.0, head_rate=0.01)
    update = optimizer.begin_head(optimizer.update)
    assert peak_of(lambda: head.step(hidden, positives, loss="logistic", update=update, want_loss=True)) <= 64 << 20
