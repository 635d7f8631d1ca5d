"""The layers after the input, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.encoders import MLP, Dropout

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


def drawn(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def dropout(share):
    return Dropout(share, [torch.Generator().manual_seed(r) for r in range(R)])


def kept_scaled(drop):
    """Give by hand what a layer's mask multiplies by, (R, N, D): 0, or 256 over the number kept."""
    words = [torch.empty(-(-N * D // 8), dtype=torch.int64).random_(-(2**63), None, generator=g) for g in drop.generators]
    random = torch.stack([w.view(torch.uint8)[: N * D].int() for w in words]).view(R, N, D)
    return (random < drop.kept).double() * 256 / drop.kept


@pytest.mark.parametrize("share", [None, 0.3, 0.001, 0.99])
@pytest.mark.parametrize("n_layers", [0, 2])
def test_learning_equals_autograd(n_layers, share):
    p = parameters(n_layers)
    z, grad = (
        torch.from_numpy(np.random.default_rng(seed).normal(size=shape)) for seed, shape in ((9, (N, R, D)), (8, (R, N, D)))
    )
    truth = {name: value.clone().requires_grad_() for name, value in p.items()}
    z_, masks = z.clone().requires_grad_(), dropout(share) if share else None
    mask = (lambda: kept_scaled(masks)) if share else lambda: 1
    h = torch.relu((z_ + truth["input.bias"]).transpose(0, 1)) * mask()
    for i in range(n_layers):
        h = h + torch.relu(torch.baddbmm(truth[f"layers.{i}.bias"].unsqueeze(1), h, truth[f"layers.{i}.weight"])) * mask()
    h.backward(grad)

    drop, found = dropout(share) if share else None, {}

    def update(name, part, gradient, copy):
        assert part == slice(None) and copy is None
        found[name] = gradient.clone()
        p[name].fill_(float("nan"))  # what comes after must not look at it

    mlp = MLP(p)
    hidden, kept = mlp.learn(z, drop, torch.float64)
    torch.testing.assert_close(hidden, h.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mlp.backward(kept, grad.clone(), drop, update), z_.grad, rtol=1e-12, atol=1e-12)
    assert found.keys() == {name for name in p if name not in ("input.weight", "head.weight", "head.bias")}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, truth[name].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_layers", [0, 2])
def test_products_in_bfloat16_err_by_its_rounding_only(n_layers):
    p = {name: value.float() for name, value in parameters(n_layers).items()}
    z, grad = (
        torch.from_numpy(np.random.default_rng(seed).normal(size=shape)) for seed, shape in ((9, (N, R, D)), (8, (R, N, D)))
    )
    found = []
    for products in (torch.float32, torch.bfloat16):
        hidden, kept = MLP(p).learn(z.float(), dropout(0.3), products)
        assert hidden.dtype == products
        found.append((hidden.float(), MLP(p).backward(kept, grad.float(), dropout(0.3), lambda *_: None).float()))
    for truth, low in zip(*found, strict=True):
        torch.testing.assert_close(low, truth, rtol=0.02, atol=0.02 * float(truth.abs().max()))


def test_the_share_dropped_is_the_one_asked_for():
    drop = Dropout(0.5, [torch.Generator().manual_seed(0)])
    out = drop(torch.ones(1, 500, 100))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert float((out == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
