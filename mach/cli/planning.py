"""What theory and the machine at hand say of a size: `mach plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mach.cli.arguments import Command, count
from mach.cli.printing import say, say_json
from mach.config import MANY_SAMPLES, Config
from mach.errors import ConfigError

if TYPE_CHECKING:
    from mach.hashing.bounds import Cost, Plan
    from mach.parallel.forecast import Forecast, Rates


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", type=count, required=True, help="K, such as 3000000 or 3m")
    parser.add_argument("--features", type=count, help="F, to count the encoders' input layers too")
    parser.add_argument("--active-features", type=count, help="features that a sample has on average, where they are sparse")
    parser.add_argument("--samples", type=count, help="N, training samples, to count the second stage, too; needs --features")
    parser.add_argument("--labels-a-sample", type=float, default=2.0, help="that a training sample has on average (default 2)")
    parser.add_argument("--memory", type=count, help="for training, such as 8G or 8GiB")
    parser.add_argument("--hidden", type=int, help="D, the widest hidden vector to propose (default as of `mach train`)")
    parser.add_argument(
        "--delta", type=float, default=0.01, help="allowed chance that two labels share all buckets (default 0.01)"
    )
    parser.add_argument("--batch-size", type=int, default=Config().batch_size, help="samples a step (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:i: what memory and time are estimated for")
    parser.add_argument("--json", action="store_true")


def _plan(args: argparse.Namespace) -> None:
    from mach.hashing.bounds import propose

    hidden = Config().n_hidden(args.samples or MANY_SAMPLES) if args.hidden is None else args.hidden
    if not args.labels_a_sample > 0:
        raise ConfigError(f"labels_a_sample={args.labels_a_sample:g} must be above 0")
    plan = propose(args.labels, args.features, args.memory, args.delta, hidden, args.active_features, args.labels_a_sample)
    rates, products, forecasts = _forecasts(args, plan)
    if args.json:
        each = {name: asdict(found) for name, found in forecasts.items()}
        return say_json({**asdict(plan), "forecast": {"rates": asdict(rates), **each}})
    say(f"{plan.n_labels:,} labels: --buckets {plan.n_buckets} --repetitions {plan.n_repetitions} --hidden {plan.hidden}")
    say(f"chance that some two labels share all their buckets: {plan.failure_probability:.2g}")
    one, every = plan.collisions_one, plan.collisions_all
    say(f"labels expected to share a label's bucket: {one:,.1f} in one repetition, {every:.2g} in all")
    say(f"{'':26}{'hashed':>16}{'full head':>16}")
    for text, of in _PLAN_LINES:
        say(f"{text:26}{of(plan.hashed):>16,}{of(plan.full):>16,}")
    hashed, full = forecasts["hashed"], forecasts["full"]
    totals = [sum(found.parts_s.values()) for found in (hashed, full)]
    say(f"{'bytes at the peak':26}{hashed.peak_bytes:>16,}{full.peak_bytes:>16,}")
    if hashed.second is not None and full.second is not None:
        for (name, value), other in zip(asdict(hashed.second).items(), asdict(full.second).values(), strict=True):
            say(f"{'  second stage, ' + name.replace('_', ' '):26}{value:>16,}{other:>16,}")
    say(f"{f'step of {args.batch_size} samples, ms':26}{1e3 * totals[0]:>16,.1f}{1e3 * totals[1]:>16,.1f}")
    for part in hashed.parts_s:
        shares = [100 * found.parts_s[part] / total for found, total in zip((hashed, full), totals, strict=True)]
        say(f"{f'  {part}, %':26}{shares[0]:>16.1f}{shares[1]:>16.1f}")
    if args.features is None:
        say("without the encoders' input layers; give --features to count them, too")
    if args.samples is None:
        say("without the second stage, which orders the first labels anew; give --samples to count it, too")
    speeds = f"{rates.flops / 1e9:,.0f} GFLOP/s of {products} products and {rates.bytes / 1e9:.1f} GB/s of memory"
    say(f"estimated with {speeds}, measured here just now; all repetitions of the hashed at once")


PLAN = Command("plan", "Propose buckets, repetitions and width for a number of labels, and their cost.", _plan_arguments, _plan)


def _forecasts(args: argparse.Namespace, plan: Plan) -> tuple[Rates, str, dict[str, Forecast]]:
    """Forecast the training of both heads of a plan, with rates of the machine at hand."""
    from mach.model import Sizes, resolve_device, resolve_precision
    from mach.parallel.forecast import forecast, measure_rates
    from mach.parallel.second import Samples

    if args.samples is not None and args.features is None:
        raise ConfigError(f"samples={args.samples} needs --features: the second stage has weights of them")
    features = args.features if args.active_features is None else args.active_features
    samples = None if args.samples is None else Samples(n=args.samples, features=features)
    device = resolve_device(args.device)
    hashed = Config(
        hidden=plan.hidden, repetitions=plan.n_repetitions, buckets=plan.n_buckets, batch_size=args.batch_size
    )  # fmt: skip
    products = resolve_precision(hashed.precision, device)
    rates = measure_rates(device, products)
    found = {}
    for name, config in (("hashed", hashed), ("full", hashed.replace(table="identity"))):
        sizes = Sizes(
            n_features=args.features or 0,
            n_labels=plan.n_labels,
            n_buckets=config.n_buckets(plan.n_labels, args.labels_a_sample),
            hidden=plan.hidden,
            features="sparse",
            labels_a_sample=args.labels_a_sample,
        )
        how: dict[str, Any] = {"rates": rates, "device": device, "samples": samples}
        found[name] = forecast(config, sizes, active_features=args.active_features, **how)
    return rates, str(products).removeprefix("torch."), found


_PLAN_LINES: list[tuple[str, Callable[[Cost], int]]] = [
    ("parameters", lambda cost: cost.parameters),
    ("  of these in heads", lambda cost: cost.head_parameters),
    ("bytes of weights", lambda cost: cost.weight_bytes),
    ("bytes of the table", lambda cost: cost.table_bytes),
    ("bytes to train at once", lambda cost: cost.training_bytes),
    ("FLOPs a sample, heads", lambda cost: 2 * cost.head_multiply_adds),
    ("FLOPs a sample, encoders", lambda cost: 2 * cost.encoder_multiply_adds),
]
