"""What do rules, storage and a bottleneck cost the full head in accuracy? Each beside a dense float32 head trained by autograd.

    python experiments/full_head/accuracy.py --out runs/full_head DATA [DATA ...] [--seeds 0 1 2] [--set hidden=256 epochs=4]
                                             [--only ROW ...] [--rates] [--quick]

DATA are data sets, or folders of text that `mach prepare` reads. All rows share the encoder, its initial weights, the order of
the batches and the settings; the baseline's head is a matrix of torch.optim.AdamW over dense logits and targets. --rates trains
on nine tenths of the train split and tries step sizes on the rest, instead. Prints a Markdown table: means over the seeds, and in
brackets the range.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, take
from mach.decoding import decode_topk
from mach.heads import Positives, Update, rule_of
from mach.heads.rules import BETAS, EPSILON
from mach.metrics import precision_at_k
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group

CPU = torch.device("cpu")
KS = (1, 3, 5)
RULES = ("adamw", "sgd", "rowwise-adagrad", "rowwise-adam")
WIDE, HALF, EIGHTH = (
    {"head_precision": storage, "precision": products}
    for storage, products in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float8", "bfloat16"))
)
AUTOGRAD = "autograd, torch AdamW, float32"
ROWS: dict[str, dict[str, object]] = {
    AUTOGRAD: WIDE,
    "adamw, float32": WIDE,
    "sgd, float32": {"head_optimizer": "sgd", **WIDE},
    **{f"{kind}, bfloat16": {"head_optimizer": kind, **HALF} for kind in RULES},
    **{f"{kind}, float8": {"head_optimizer": kind, **EIGHTH} for kind in RULES},
    "rowwise-adam, float8, products in float8": {"head_optimizer": "rowwise-adam", **EIGHTH, "precision": "float8"},
    "adamw, bfloat16, bottleneck 64": {**HALF, "bottleneck": 64},
    "rowwise-adam, bfloat16, bottleneck 64": {"head_optimizer": "rowwise-adam", **HALF, "bottleneck": 64},
}
RATES = {"sgd": (1, 3, 10, 30), "rowwise-adagrad": (0.01, 0.03, 0.05, 0.1), "rowwise-adam": (0.001, 0.003, 0.01, 0.03)}


class DenseHead:
    """The plain way, for the logistic loss: dense logits and targets, autograd, torch's AdamW. Stands in for `LinearHead`."""

    def __init__(self, weight_RBD: Tensor, bias_RB: Tensor, weight_decay: float):
        self.leaves = [weight_RBD.requires_grad_(), bias_RB.requires_grad_()]
        self.adamw = torch.optim.AdamW(self.leaves, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)

    @property
    def weight(self) -> Tensor:
        """Give the weight, (R, B, D)."""
        return self.leaves[0].detach()

    def some_logits(self, hidden_RND: Tensor, outputs: slice | Tensor, room: Tensor) -> Tensor:
        """Give some of the outputs, (R, N, C)."""
        weight, bias = (x.detach()[:, outputs] for x in self.leaves)
        return hidden_RND @ weight.transpose(1, 2) + bias.unsqueeze(1)

    def logits(self, hidden_RND: Tensor) -> Tensor:
        """Give all outputs, (N, R, B)."""
        weight, bias = self.leaves
        return (hidden_RND @ weight.transpose(1, 2) + bias.unsqueeze(1)).transpose(0, 1)

    def step(
        self, hidden_RND: Tensor, positives: Positives, *, loss: str, update: Update, want_loss: bool, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Take one step with the rate of the update's rule."""
        assert loss == "logistic"
        rule = rule_of(update)
        assert rule is not None
        self.adamw.param_groups[0]["lr"] = rule.rate
        with torch.enable_grad():
            hidden = hidden_RND.detach().requires_grad_()
            z = self.logits(hidden)
            y = torch.zeros_like(z)
            y[positives.samples, positives.repetitions, positives.buckets] = 1
            value = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / hidden.shape[1]
            self.adamw.zero_grad()
            value.backward()
        self.adamw.step()
        assert hidden.grad is not None
        return hidden.grad, value.detach()[None] if want_loss else None


def group_of(config: mach.Config, dataset: mach.Dataset, *, dense: bool) -> Group:
    """Give the full head's group, with a plain head in it if asked."""
    sizes = sizes_of(config, dataset)
    group = Group(config, dataset, sizes, table_of(config, sizes, [0], dataset.label_names), CPU)
    if dense:
        packed: Any = group.packed  # takes what answers like its own head
        parameters = packed.parameters
        packed.head = DenseHead(parameters["head.weight"], parameters["head.bias"], config.head_decay())
    return group


def measure(group: Group, features: CSR | np.ndarray, labels: CSR) -> list[float]:
    """Give P@1, P@3 and P@5."""
    found = []
    for start in range(0, len(labels), 256):
        rows = np.arange(start, min(start + 256, len(labels)))
        outputs = group.packed.logits(group._batch(take(features, rows))).float().numpy()
        found.append(decode_topk(outputs, group.table, max(KS), loss=group.config.loss, estimator="logits").labels)
    return [100 * precision_at_k(np.concatenate(found), labels, k) for k in KS]


def train(config: mach.Config, dataset: mach.Dataset, *, dense: bool, on_test: bool) -> tuple[list[float], float]:
    """Train; give the accuracy on the test split, or on what was held out, and seconds of training."""
    group = group_of(config, dataset, dense=dense)
    began, validation = time.perf_counter(), {}
    for record in group.steps(lambda r: None):
        validation = record.validation or validation
    seconds = time.perf_counter() - began
    if on_test:
        test = dataset.split("test")
        return measure(group, test.features, test.labels), seconds
    return [100 * validation[f"P@{k}"] for k in KS], seconds


def table(
    dataset: mach.Dataset, base: mach.Config, rows: dict[str, dict[str, object]], seeds: Sequence[int], *, on_test: bool,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Train every row with every seed and say its line."""
    say("| head | P@1 | P@3 | P@5 | MB of head and its state | train s |\n|---|---|---|---|---|---|")
    for name, settings in rows.items():
        config = base.replace(**settings)
        found = [train(config.replace(seed=s), dataset, dense=name == AUTOGRAD, on_test=on_test) for s in seeds]
        of_k = np.array([accuracy for accuracy, _ in found])
        cells = [f"{of_k[:, i].mean():.2f} ({of_k[:, i].min():.2f}-{of_k[:, i].max():.2f})" for i in range(len(KS))]
        held = group_of(config, dataset, dense=False).tensors()
        megabytes = sum(x.nbytes for tensor, x in held.items() if "head." in tensor) / 1e6
        say(f"| {name} | {' | '.join(cells)} | {megabytes:.1f} | {np.mean([s for _, s in found]):.0f} |")


def plain(text: str) -> tuple[str, object]:
    """Read a setting `name=value`."""
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", type=plain, default=[], metavar="NAME=VALUE", help="settings of all rows")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"some of the rows: {'; '.join(ROWS)}")
    parser.add_argument("--rates", action="store_true", help="try step sizes on held-out training samples")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch of a narrow model: does it run?")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    base = mach.Config(table="identity", rerank=0).replace(**dict(args.set))
    rows, seeds = {name: settings for name, settings in ROWS.items() if not args.only or name in args.only}, args.seeds
    if args.quick:
        base, seeds = base.replace(hidden=32, epochs=1), seeds[:1]
    if args.rates:
        base, rows = base.replace(validation=0.1), {"adamw": {}}
        for kind, rates in RATES.items():
            rows |= {f"{kind} {rate:g}": {"head_optimizer": kind, "head_learning_rate": rate} for rate in rates}
    for source in args.data:
        is_made = (source / "manifest.json").exists()
        dataset = mach.Dataset.open(source) if is_made else mach.prepare(source, args.out / f"{source.name}.data")
        print(f"\n{source.name}: {dataset.n_labels:,} labels, {len(dataset.split('train').labels):,} training samples\n")
        table(dataset, base, rows, seeds, on_test=not args.rates, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
