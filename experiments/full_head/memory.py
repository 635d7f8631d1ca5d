"""What does a step of a head over millions of labels take beyond its weights? Counted allocation by allocation, on a CPU.

    python experiments/full_head/memory.py [--labels 3000000] [--hidden 768] [--batch-size 128]
                                           [--storages float8 ...]

One row for each type that the weights can be stored in, and of the products, and one of outputs in float8; sgd, which keeps no
state; the logistic loss, not told. "Counted" is exact for tensors: the most bytes alive at once of all that torch allocated since
the head was made, rooms that are kept included. "Resident" is the growth of the process's memory in such a step, which holds what
libraries take besides.
The weights of the full size take 9.2, 4.6 and 2.3 GB.

The figures of others are those published for all of training with 3 million labels of width 768, encoder included.
"""

from __future__ import annotations

import argparse
import gc

import torch
from heads import STORAGES, positives, stepping, weights
from measure import MIB, allocated_peak, machine, resident_growth

PUBLISHED = [("Renee (MLSys 2023), fp16", 39.7), ("ELMO (ICML 2025), bf16", 10.4), ("ELMO (ICML 2025), fp8", 6.6)]
GOAL = 300  # MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=3_000_000)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=STORAGES)
    args = parser.parse_args()
    K, D, N = args.labels, args.hidden, args.batch_size
    print(f"K = {K:,}, D = {D}, N = {N}, sgd; {machine()}\n")
    print(f"| weights in | products in | weights GiB | step, counted MiB | step, resident MiB | at most {GOAL} MiB | total GiB |")
    print("|---|---|---|---|---|---|---|")
    small = weights(1000, D, "float32")
    for products in (torch.float32, torch.bfloat16):
        stepping(small, torch.ones(1, N, D, dtype=products), positives(N, 1000), "sgd")()  # kernels compiled, threads started
    for storage in args.storages:
        for products in (torch.float32, torch.bfloat16):
            measure(K, D, N, storage, products)
        if storage == "float8":
            measure(K, D, N, storage, torch.bfloat16, in_float8=True)
    for name, gib in PUBLISHED:
        print(f"| {name} | as published | | | | | {gib} |")


def measure(n_labels: int, width: int, n_samples: int, storage: str, products: torch.dtype, *, in_float8: bool = False) -> None:
    """Print one row: a first step counted by torch, a first step of another such head by the system."""
    parameters, of = weights(n_labels, width, storage), positives(n_samples, n_labels)
    hidden = torch.randn(1, n_samples, width, generator=torch.Generator().manual_seed(1)).to(products)
    held = sum(value.nbytes for value in parameters.values())
    counted = allocated_peak(stepping(parameters, hidden, of, "sgd", in_float8=in_float8))
    gc.collect()
    resident = resident_growth(stepping(parameters, hidden, of, "sgd", in_float8=in_float8))
    verdict, name = "yes" if counted <= GOAL * MIB else "no", str(products).removeprefix("torch.")
    name += ", outputs in float8" if in_float8 else ""
    step = f"{counted / MIB:,.0f} | {resident / MIB:,.0f} | {verdict}"
    print(f"| {storage} | {name} | {held / 2**30:.2f} | {step} | {(held + counted) / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
