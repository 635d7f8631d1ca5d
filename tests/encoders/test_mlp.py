"""The layers after the input, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.encoders import MLP

R, N, D = 2, 3, 4


def parameters(n_layers):
    rng = np.random.default_rng(n_layers)
    shapes = {"input.weight": (5, R, D), "input.bias": (R, D), "head.weight": (R, 7, D), "head.bias": (R, 7)}
    for i in range(n_layers):
        shapes |= {f"layers.{i}.weight": (R, D, D), f"layers.{i}.bias": (R, D)}
    return {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}


def hidden_reference(z_NRD, parameters, n_layers):
    """h = max(0, z + b); then h <- h + max(0, h W + b), in loops."""
    p = {name: value.tolist() for name, value in parameters.items()}
    hidden_RND = []
    for r in range(R):
        rows = []
        for n in range(N):
            h = [max(0.0, float(z_NRD[n, r, d]) + p["input.bias"][r][d]) for d in range(D)]
            for i in range(n_layers):
                W, b = p[f"layers.{i}.weight"][r], p[f"layers.{i}.bias"][r]
                h = [h[e] + max(0.0, sum(h[d] * W[d][e] for d in range(D)) + b[e]) for e in range(D)]
            rows.append(h)
        hidden_RND.append(rows)
    return torch.tensor(hidden_RND, dtype=torch.float64)


@pytest.mark.parametrize("n_layers", [0, 1, 3, 11])
def test_forward_equals_loops(n_layers):
    p = parameters(n_layers)
    z = torch.from_numpy(np.random.default_rng(9).normal(size=(N, R, D)))
    torch.testing.assert_close(MLP(p).forward(z), hidden_reference(z, p, n_layers), rtol=1e-12, atol=1e-12)


def test_each_layer_is_dropped_once_in_order():
    p, calls = parameters(2), []

    def drop(x):
        calls.append(tuple(x.shape))
        return torch.zeros_like(x)

    hidden = MLP(p).forward(torch.ones(N, R, D, dtype=torch.float64), drop)
    assert calls == [(R, N, D)] * 3 and not hidden.any()
