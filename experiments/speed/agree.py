"""Do packed repetitions become what each becomes alone? The same repetitions trained in one group and one by one.

    python experiments/speed/agree.py DATA --out runs/agree [--repetitions 4]

DATA is a folder of XC-repository text. Prints how far the weights are apart after one step and after the whole training, beside
how far two seeds are, and P@1 of both ensembles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import mach
from mach.compare.rows import this_machine
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group

CPU = torch.device("cpu")


def trained(config: mach.Config, dataset: mach.Dataset, repetitions: list[int], n_steps: int) -> list[dict[str, torch.Tensor]]:
    """Train a group for some steps (0: to the end); give each repetition's weights."""
    sizes = sizes_of(config, dataset)
    group = Group(config, dataset, sizes, table_of(config, sizes, repetitions, dataset.label_names), CPU)
    for record in group.steps(lambda r: None):
        if record.step == n_steps:
            break
    return [group.packed.repetition(r) for r in range(len(repetitions))]


def apart(some: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> str:
    """Give the largest and the root-mean-square difference of any weight, in units of the root-mean-square weight."""
    worst, mean = 0.0, 0.0
    for one, other in zip(some, others, strict=True):
        for name in ("input.weight", "head.weight"):
            size = float(other[name].square().mean().sqrt())
            difference = one[name] - other[name]
            worst = max(worst, float(difference.abs().max()) / size)
            mean = max(mean, float(difference.square().mean().sqrt()) / size)
    return f"{worst:.1e} / {mean:.1e}"


def precision(config: mach.Config, dataset: mach.Dataset, groups: list[list[int]], out: Path) -> float:
    """Train an ensemble in these groups and give its P@1, in percent."""
    for group in groups:
        mach.train(config, dataset, out, repetitions=group)
    test = dataset.split("test")
    return 100 * float(np.mean(mach.precision_at_k(mach.load(out).predict_topk(test.features, 1).labels, test.labels, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=4)
    args = parser.parse_args()
    dataset, numbers = mach.prepare(args.data, args.out / "data"), list(range(args.repetitions))
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print("Largest / root-mean-square difference of a weight, in units of the root-mean-square weight:\n")
    print("| products in | after one step | after training | two seeds, after training | P@1 packed | P@1 one by one |")
    print("|---|---|---|---|---|---|")
    for kind in ("float32", "bfloat16"):
        config = mach.Config(repetitions=args.repetitions, precision=kind)
        cells = []
        for n_steps in (1, 0):
            packed = trained(config, dataset, numbers, n_steps)
            cells.append(apart(packed, [trained(config, dataset, [r], n_steps)[0] for r in numbers]))
        cells.append(apart(trained(config.replace(seed=1), dataset, [0], 0), packed[:1]))
        for groups in ([numbers], [[r] for r in numbers]):
            cells.append(f"{precision(config, dataset, groups, args.out / f'{kind}-{len(groups)}'):.2f}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
