"""How accurate is the ensemble, for what it costs? With and without its second stage, and the full head of the same encoder.

    python experiments/accuracy/table/run.py DATA [DATA ...] --out runs/accuracy [--heads ours,full] [--seeds 0,1,2] [--dev alike]

DATA are folders of XC-repository text with train.txt, test.txt and perhaps dev.txt. "ours" is `mach train` without flags, but for
rows of the input layer in bfloat16 also where that is not the default, so that sizes are the same everywhere; "wide" ours of the
full head's width, which is another where samples are few. "eight" is eight repetitions of about 8 sqrt(K) buckets by AdamW, as
ours is but where a sample names one label; "half" the same with four repetitions, "quarter" with a quarter of the full head's
output parameters in all, and "published" hashed at random and without its second stage, which is MACH as its authors have it:
where ours is the same but for the second stage, that is measured with it, else it is to be asked for. "full" is the full head
without a second stage, "full-64" with a bottleneck of 64 before its outputs; both stages have
"full-reranked" and "full-64-reranked".
With --dev alike, a twentieth of train, whole groups of look-alikes, is held out to choose cost and weight of the second stage by,
as for a test split drawn in groups. Prints a Markdown table of the test split. A second call trains only what is left.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import mach
from mach.compare.rows import Row, this_machine
from mach.compare.run import Named, compare, measure
from mach.data import Dataset, split_dev
from mach.store.reranker import reranker_record

METRICS = (("P@1", "P@3", "P@5"), ("PSP@1", "PSP@3", "PSP@5"), ("R@10",), ("R@100",))


def configurations(n_labels: int, n_samples: int, seed: int) -> dict[str, mach.Config]:
    ours = mach.Config(seed=seed, input_precision="bfloat16")
    eight = ours.replace(repetitions=8, buckets=ours.n_buckets(n_labels), head_optimizer="adamw")
    full = ours.replace(table="identity", rerank=0)
    quarter = n_labels * full.n_hidden(n_samples) // (4 * 8 * eight.n_hidden(n_samples))
    return {
        "ours": ours,
        "wide": ours.replace(hidden=full.n_hidden(n_samples)),
        "eight": eight,
        "published": eight.replace(grouped=0, rerank=0),
        "half": eight.replace(repetitions=4),
        "full": full,
        "full-64": full.replace(bottleneck=64),
        "full-reranked": full.replace(rerank="auto"),
        "full-64-reranked": full.replace(bottleneck=64, rerank="auto"),
        "quarter": eight.replace(buckets=max(2, quarter)),
    }


def without_reranker(row: Row, run: Path, dataset: Dataset) -> Row:
    """Give the row of the same repetitions without their second stage."""
    second = reranker_record(run)
    if second is None:
        raise SystemExit(f"{run}: has no re-ranker; delete the folder and run again")
    metrics, predict_s, decode_s = measure(mach.load(run, rerank=False), dataset)
    return dataclasses.replace(
        row, name="published", metrics=metrics, predict_s=predict_s, decode_s=decode_s, train_s=row.train_s - second["train_s"],
        parameters=row.parameters - second["parameters"], bytes=row.bytes - second["bytes"],
    )  # fmt: skip


def line(name: str, row: Row, seed: int) -> str:
    figures = [" / ".join(f"{100 * row.metrics[m]:.2f}" if m in row.metrics else "-" for m in metrics) for metrics in METRICS]
    cost = [
        f"{row.train_s:.0f}",
        f"{row.parameters / 1e6:.1f}",
        f"{row.bytes / 1e6:.0f}",
        f"{row.predict_ms:.3f}",
        f"{row.decode_ms:.3f}",
    ]
    return f"| {' | '.join([name, row.name, str(seed), *figures, *cost])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", default="ours,half,full,quarter")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dev", choices=("samples", "alike"))
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    head = "data | head | seed | P@1 / P@3 / P@5 | PSP@1 / 3 / 5 | R@10 | R@100 | train s | parameters, million | MB | predict ms"
    print(f"| {head} | decode ms |")
    print("|" + "---|" * 12)
    for source in args.data:
        dataset, name = mach.prepare(source, args.out / f"{source.name}.data"), source.name
        if args.dev:
            name = f"{name}-{args.dev}"
            dataset = split_dev(dataset, args.out / f"{name}.data", share=0.05, by=args.dev)
        for seed in map(int, args.seeds.split(",")):
            known = configurations(dataset.n_labels, dataset.split("train").n_samples, seed)
            named = [Named(head, known[head]) for head in args.heads.split(",")]
            out = args.out / f"{name}-{seed}"
            for row in compare(dataset, out, named):
                print(line(name, row, seed), flush=True)
                derived = row.name == "ours" and "published" not in args.heads.split(",")
                if derived and not mach.load(out / row.name, rerank=False).table.given:
                    print(line(name, without_reranker(row, out / row.name, dataset), seed), flush=True)


if __name__ == "__main__":
    main()
