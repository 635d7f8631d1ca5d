"""Choose between the usual sum, other sums and networks by few held-out samples, by several rules.

    python experiments/accuracy/networks/choose.py DATA [DATA ...] --out runs/networks [--sizes 50,100,300,1000] [--draws 5]

DATA are as for run.py, which this shares its runs with. So many held-out samples choose, the others are measured on; the mean
of several draws. Prints a Markdown table: P@1 / P@3 / P@5 of the usual sum (cost 0.2, weight 1.5, what is decoded), and what is
gained over it by the best sum; by the best of sums and networks, if it is ahead of the usual sum by more than its standard error;
by networks; and by networks, unless a sum is ahead of these by more than two standard errors.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from run import Case, precision

from mach.compare.rows import this_machine
from mach.decoding.rerank import DEFAULT_WEIGHT
from mach.parallel import judge

RULES = ("best sum", "best, by 1 error", "networks", "networks, but by 2 errors")
Tried = list[tuple[judge.Choice, np.ndarray]]


def ahead(one: np.ndarray, other: np.ndarray) -> float:
    """Give the lead of one in standard errors."""
    lead = one - other
    return float(lead.mean() / max(lead.std() / math.sqrt(len(lead)), 1e-12))


def chosen(tried: Tried, n_costs: int) -> dict[str, judge.Choice]:
    """Give what each rule takes: networks are tried first, one for each cost, then the usual sum."""
    networks, usual = tried[0], tried[n_costs]
    best, best_sum = (max(some, key=lambda each: float(each[1].mean())) for some in (tried, tried[n_costs:]))
    return {
        "usual": usual[0],
        "best sum": best_sum[0],
        "best, by 1 error": (best if ahead(best[1], usual[1]) > 1 else usual)[0],
        "networks": networks[0],
        "networks, but by 2 errors": (best_sum if ahead(best_sum[1], networks[1]) > 2 else networks)[0],
    }


def measure(case: Case, sizes: list[int], draws: int) -> None:
    fits, random = case.fits(np.concatenate([case.lists, case.beside], 1)), np.random.default_rng(0)
    for size in sizes:
        gains: dict[str, list[np.ndarray]] = {}
        for _ in range(draws if size < len(case.near) else 0):
            some, rest = np.split(random.permutation(len(case.near)), [size])
            tried = case.part(some).tried(fits, DEFAULT_WEIGHT, case.heard(some, case.evidence, case.near))
            given = case.part(rest), fits, case.heard(rest, case.evidence, case.near)
            for rule, choice in chosen(tried, len(fits)).items():
                gains.setdefault(rule, []).append(precision(choice, *given))
        if gains:
            usual = np.mean(gains["usual"], 0)
            cells = [" / ".join(f"{x:.2f}" for x in usual)]
            cells += [" / ".join(f"{x:+.2f}" for x in np.mean(gains[rule], 0) - usual) for rule in RULES]
            print(f"| {case.name} | {size:,} of {len(case.near):,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="50,100,300,1000")
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    judge.NETWORKS_FROM = 1  # whatever the size
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()), "\n")
    print(f"| data | chosen by | usual | {' | '.join(RULES)} |\n|{'---|' * (3 + len(RULES))}")
    for source in args.data:
        measure(Case.of(source, args.out, 4), [int(size) for size in args.sizes.split(",")], args.draws)


if __name__ == "__main__":
    main()
