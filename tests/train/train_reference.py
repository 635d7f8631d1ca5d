"""One repetition's training as the papers write it: dense float64 matrices, autograd, AdamW and row-wise Adam in numpy.

It shares with the package the initial weights, the order of samples and the step size, which have tests of their own.
"""

from __future__ import annotations

import numpy as np
import torch

from mach.model import INPUT, initial_parameters
from mach.train.schedule import order_of, rate_at, seed_of

B1, B2, EPSILON = 0.9, 0.999, 1e-8


def adamw_reference(weight, first, second, gradient, *, step, rate, weight_decay):
    """Update in place (Loshchilov & Hutter, algorithm 2 without the schedule; decay times the rate, as torch has it)."""
    weight *= 1 - rate * weight_decay
    first[...] = B1 * first + (1 - B1) * gradient
    second[...] = B2 * second + (1 - B2) * gradient**2
    weight -= rate * (first / (1 - B1**step)) / (np.sqrt(second / (1 - B2**step)) + EPSILON)


def row_adam_reference(weight_FD, second_F, gradient_FD, touched, *, step, rate):
    """Update the touched rows in place, one at a time: one second moment a row, no momentum."""
    for f in touched:
        second_F[f] = B2 * second_F[f] + (1 - B2) * float(np.mean(gradient_FD[f] ** 2))
        weight_FD[f] -= rate * gradient_FD[f] / (np.sqrt(second_F[f] / (1 - B2**step)) + EPSILON)


def head_reference(kind, weight, kept, gradient, *, step, rate, weight_decay):
    """Update a head's weight (B, D) or bias (B,) in place, by the rule of that name; `kept` starts as two zeros of its shape."""
    if kind == "adamw":
        return adamw_reference(weight, *kept, gradient, step=step, rate=rate, weight_decay=weight_decay)
    weight *= 1 - rate * weight_decay
    for b in range(len(weight)):
        square = np.mean(gradient[b] ** 2)
        if kind == "rowwise-adagrad":
            kept[1][b] += square
            weight[b] -= rate * gradient[b] / (np.sqrt(kept[1][b]) + EPSILON)
        elif kind == "rowwise-adam":
            kept[1][b] = B2 * kept[1][b] + (1 - B2) * square
            weight[b] -= rate * gradient[b] / (np.sqrt(kept[1][b] / (1 - B2**step)) + EPSILON)
        else:
            weight[b] -= rate * gradient[b]


def loss_reference(z_NB, y_NB, loss):
    if loss == "logistic":
        return (torch.nn.functional.softplus(z_NB) - y_NB * z_NB).sum() / len(z_NB)
    if loss == "squared-hinge":
        return ((1 - (2 * y_NB - 1) * z_NB).clamp(min=0) ** 2).sum() / len(z_NB)
    return -(y_NB / y_NB.sum(1, keepdim=True) * torch.log_softmax(z_NB, 1)).sum() / len(z_NB)


def train_reference(config, sizes, X_NF, Y_NK, table_K, number, n_steps, is_touched_NF):
    """Train repetition `number` for `n_steps` steps; give its parameters as numpy arrays, and the loss of each step."""
    norms = np.sqrt((X_NF**2).sum(1, keepdims=True))
    X = X_NF / np.where(norms > 0, norms, 1) if config.normalize else X_NF
    targets_NB = np.zeros((len(X), sizes.n_buckets))
    for n, k in zip(*np.nonzero(Y_NK), strict=True):
        targets_NB[n, table_K[k]] = 1
    generator = torch.Generator().manual_seed(seed_of(config.seed, "weights", number))
    start = initial_parameters(config, sizes, generator, torch.float64)
    weights = {name: value.numpy() for name, value in start.items()}
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    second_F = np.zeros(len(weights[INPUT]))
    per_epoch = -(-len(X) // config.batch_size)
    n_epochs = config.n_epochs(len(X), sizes.n_buckets, sizes.labels_a_sample)
    rates = config.rates(len(X), sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample)
    rule = config.head_rule(sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample)
    losses, n_head = [], 0
    for step in range(n_steps):
        epoch, place = divmod(step, per_epoch)
        rows = order_of(len(X), config.seed, epoch)[place * config.batch_size : (place + 1) * config.batch_size]
        leaves = {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()}
        drop = _dropout(config, config.share_dropped(len(X)), number, step, (len(rows), config.hidden))
        h = drop(torch.relu(torch.from_numpy(X[rows]) @ leaves[INPUT] + leaves["input.bias"]))
        for i in range(config.layers):
            h = h + drop(torch.relu(h @ leaves[f"layers.{i}.weight"] + leaves[f"layers.{i}.bias"]))
        h = h @ leaves["bottleneck.weight"] if "bottleneck.weight" in leaves else h
        share, value, gradient_h = rate_at(step, n_epochs * per_epoch, config.warmup), 0.0, torch.zeros_like(h)
        size = config.head_batch_size or len(rows)
        for start in range(0, len(rows), size):
            part, n_head = slice(start, start + size), n_head + 1
            own = {name: torch.tensor(weights[name], requires_grad=True) for name in ("head.weight", "head.bias")}
            narrow = h[part].detach().requires_grad_()
            z = narrow @ own["head.weight"].T + own["head.bias"]
            loss = loss_reference(z, torch.from_numpy(targets_NB[rows[part]]), config.loss)
            loss.backward()
            gradient_h[part] = narrow.grad * len(narrow) / len(rows)
            value += loss.item() * len(narrow) / len(rows)
            for name, leaf in own.items():
                how = {"step": n_head, "rate": share * rates.head, "weight_decay": config.head_decay()}
                head_reference(rule, weights[name], moments[name], leaf.grad.numpy(), **how)
        h.backward(gradient_h)
        losses.append(value)
        for name, leaf in leaves.items():
            if name.startswith("head."):
                continue
            gradient, row_rate = leaf.grad.numpy(), share * rates.rows
            if name == INPUT:
                touched = np.flatnonzero(is_touched_NF[rows].any(0))
                row_adam_reference(weights[name], second_F, gradient, touched, step=step + 1, rate=row_rate)
            else:
                how = {"step": step + 1, "rate": share * rates.dense, "weight_decay": config.weight_decay}
                adamw_reference(weights[name], *moments[name], gradient, **how)
    return weights, losses


def _dropout(config, share, number, step, shape):
    """Each step and repetition has its own generator, from which each layer draws its mask in turn."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, "dropout", number, step))
    if not share:
        return lambda h: h
    kept = round(256 * (1 - share))
    n = shape[0] * shape[1]

    def drop(h):  # a later layer draws from where the one before stopped
        words = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        mask = (words.view(torch.uint8)[:n].int() < kept).reshape(shape)
        return h * mask.double() * 256 / kept

    return drop
