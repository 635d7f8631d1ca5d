"""What does a full head on several ranks send, and does it learn the same? Prints the table of scaling.md, draws scaling.svg.

python experiments/full_head/scaling.py DATA [--steps 200] [--hidden 128] [--batch-size 256] [--loss logistic]

Trains the same steps as one process (the plain loop) and as 2 and 4 ranks over gloo, all on this machine, one thread each, in
float32. For each: the bytes that `mach.train.traffic` predicts, those that `CountingComm` counted, those that the system saw on
the loopback interface (all of this machine's, so nothing else may use it), and the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from mach.config import Config
from mach.data import Dataset
from mach.draw import INK, LINE, PALETTE
from mach.parallel.comm import CountingComm, connect
from mach.store.folder import sizes_of, table_of
from mach.train import loop
from mach.train.loop import Group
from mach.train.sharded import ShardedGroup
from mach.train.traffic import step_bytes

CPU = torch.device("cpu")
SIZES = (1, 2, 4)
HERE = Path(__file__).parent


def config_of(args: argparse.Namespace, dataset: Dataset) -> Config:
    """Give a config of as many epochs as the steps need."""
    epochs = -(-args.steps * args.batch_size // dataset.split("train").n_samples)
    return Config(
        table="identity", loss=args.loss, hidden=args.hidden, layers=args.layers, batch_size=args.batch_size, epochs=epochs,
        precision="float32",
    )  # fmt: skip


def loopback_bytes() -> int:
    """Read how many bytes the loopback interface has carried."""
    lines = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(lines[0].split()[9]) if lines else 0


def work(args: argparse.Namespace) -> None:
    """Be one rank: train the steps and note what was sent."""
    torch.set_num_threads(1)
    loop.LOSS_EVERY = 5
    dataset = Dataset.open(args.data)
    config = config_of(args, dataset)
    sizes = sizes_of(config, dataset)
    comm = CountingComm(connect(CPU))
    where = (config, dataset, sizes, table_of(config, sizes, [0], None), CPU)
    group = ShardedGroup(*where, comm) if comm.size > 1 else Group(*where)
    group.held_out = None  # validation sends, too, and is not of a step
    predicted, losses = 0, []
    comm.barrier()
    before = loopback_bytes()
    comm.barrier()
    for record in islice(group.steps(lambda r: None), args.steps):
        place = (record.step - 1) % group.steps_per_epoch
        n = min(config.batch_size, group.n_samples - place * config.batch_size)
        predicted += sum(step_bytes(config, args.hidden, n, comm.rank, comm.size, want_loss=record.loss is not None).values())
        if record.loss is not None:
            losses.append((record.step, record.loss))
    comm.barrier()
    seen = loopback_bytes() - before
    counted = sum(comm.sent.values())
    totals = comm.all_reduce(torch.tensor([predicted, counted])).wait().tolist()
    if comm.rank == 0:
        found = {"predicted": totals[0], "counted": totals[1], "loopback": seen, "losses": losses, "parts": group.clock.read()}
        args.worker.write_text(json.dumps(found))
    comm.barrier()
    comm.close()


def run(size: int, folder: Path) -> dict[str, Any]:
    """Train with some number of processes; give what rank 0 noted."""
    out = folder / f"{size}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(size)]
    command = [sys.executable, *(launcher if size > 1 else []), __file__, *sys.argv[1:], "--worker", str(out)]
    root = str(HERE.parents[1])
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root})
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def draw(runs: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw the losses on top of each other, and how far those of ranks are from one process's."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1.4), layout="constrained")
    alone = dict(runs[1]["losses"])
    for i, (size, found) in enumerate(runs.items()):
        steps, losses = zip(*found["losses"], strict=True)
        name = "one process" if size == 1 else f"{size} ranks"
        above.plot(steps, losses, color=PALETTE[i], linewidth=(6, 3, 1)[i], alpha=(0.35, 0.7, 1)[i], label=name)
        if size > 1:
            distances = [abs(loss - alone[step]) / alone[step] for step, loss in found["losses"]]
            below.semilogy(steps, [max(d, 1e-9) for d in distances], color=PALETTE[i], label=name)
    above.set_ylabel("loss, nats a sample")
    below.set_ylabel("relative distance\nfrom one process")
    below.set_xlabel("step")
    above.legend(frameon=False)
    for axes in (above, below):
        axes.tick_params(colors=INK)
        axes.grid(color=LINE)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--loss", default="softmax")
    parser.add_argument("--out", type=Path, default=HERE / "scaling.svg", help="the figure")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        runs = {size: run(size, Path(folder)) for size in SIZES}
    draw(runs, args.out)
    alone = dict(runs[1]["losses"])
    print("| ranks | predicted, bytes a step | counted | on the loopback | last loss | furthest loss | time waiting |")
    print("|---|---|---|---|---|---|---|")
    for size, found in runs.items():
        numbers = " | ".join(f"{found[name] / args.steps:,.0f}" for name in ("predicted", "counted", "loopback"))
        distance = max(abs(loss - alone[step]) / alone[step] for step, loss in found["losses"])
        share = found["parts"].get("communication", 0.0) / sum(found["parts"].values())
        print(f"| {size} | {numbers} | {found['losses'][-1][1]:.5f} | {distance:.1e} | {share:.0%} |")


if __name__ == "__main__":
    main()
