"""Is the full head's step on a GPU bound by the GPU? The fused step, the chunked one and autograd, against products and memory.

    python experiments/full_head/gpu.py [--quick] [--minutes 7] [--no-check]

Checks the kernels on the device against float64 first, and outputs in float8 against the chunked path. Then measures what the
device can (products, a copy of memory) and times a step of each head: its floor is the larger of three products at that rate and
of the weights read twice and written once. Last, the kernels' shares of a step, and other sizes of their blocks. Plain gradient
descent, so that only weights are in memory.
`--quick` tries the script on a CPU, in Triton's interpreter, with tiny sizes. Prints Markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--quick" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a machine with a GPU may have torch and Triton, but not mach

import numpy as np
import torch
import triton
from torch import Tensor

from mach.heads import LinearHead, Positives
from mach.heads.fused import fused_step, triton_batch, triton_step
from mach.heads.linear import CHUNK_BYTES
from mach.heads.rules import Rule, State
from mach.heads.scaled import Scaled, scaled

CASES = [(131_072, 768, 128), (670_091, 768, 512), (3_000_000, 768, 128), (3_000_000, 64, 1024)]  # K, D, N
LABELS = 5  # positives of a sample
FLOAT8 = torch.float8_e4m3fn
MODES = {  # storage, type of the products
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float8": (FLOAT8, torch.bfloat16),
    "float8, outputs in float8": (FLOAT8, FLOAT8),  # the gradients' products in bfloat16
    "float32, products in bfloat16": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
LOW, EIGHTH = triton_batch.LOW, triton_batch.EIGHTH
CHUNKS = [CHUNK_BYTES["cuda"], 8 << 20, 128 << 20, 4 << 30]
TRIED = {
    "outputs 256 x 64": replace(LOW, outputs=(256, 64)),
    "outputs 128 x 128": replace(LOW, outputs=(128, 128), n_stages=2),
    "outputs 64 x 64": replace(LOW, outputs=(64, 64)),
    "update 32 x 128": replace(LOW, update=(32, 128)),
    "update 64 x 64": replace(LOW, update=(64, 64)),
    "update 128 x 64": replace(LOW, update=(128, 64)),
    "2 programs": replace(LOW, n_programs=2),
    "update 32 x 128, 2 programs": replace(LOW, update=(32, 128), n_programs=2),
    "update 64 x 64, 2 programs": replace(LOW, update=(64, 64), n_programs=2),
    "4 stages": replace(LOW, n_stages=4),
    "2 stages": replace(LOW, n_stages=2),
    "4 warps": replace(LOW, n_warps=4),
    "64 samples, so products by torch": replace(LOW, samples=64),
}
TRIED_EIGHTH = {
    "outputs 128 x 64": replace(EIGHTH, outputs=(128, 64)),
    "outputs 64 x 128": replace(EIGHTH, outputs=(64, 128)),
    "outputs 256 x 128": replace(EIGHTH, outputs=(256, 128), n_stages=2),
    "2 programs": replace(EIGHTH, n_programs=2),
    "update 64 x 64, 2 programs": replace(EIGHTH, update=(64, 64), n_programs=2),
    "4 stages": replace(EIGHTH, n_stages=4),
    "2 stages": replace(EIGHTH, n_stages=2),
    "4 warps": replace(EIGHTH, n_warps=4),
    "64 samples, so products by torch": replace(EIGHTH, samples=64),
}


def sgd(rate: float = 0.05, weight_decay: float = 0.01) -> Rule:
    """Give the rule that is timed."""
    return Rule(kind="sgd", rate=rate, weight_decay=weight_decay, step=1, seed=7, repetitions=(0,))


class Problem:
    """A head of one repetition with drawn weights, and one batch."""

    def __init__(self, K: int, D: int, N: int, storage: torch.dtype, products: torch.dtype, device: torch.device):
        self.device, shape = device, (1, K, D)
        generator = torch.Generator(device).manual_seed(K + D)
        self.weight = torch.empty(shape, dtype=storage, device=device)
        for start in range(0, K, 1 << 16):
            rows = self.weight[:, start : start + (1 << 16)]
            drawn = torch.randn(rows.shape, generator=generator, device=device) / D**0.5
            rows.copy_(drawn * (32 if storage == FLOAT8 else 1))
        self.bias = torch.full((1, K), -8.0, device=device)
        self.in_float8 = products == FLOAT8
        hidden = torch.randn(1, N, D, generator=generator, device=device)
        self.hidden = hidden.to(torch.bfloat16 if self.in_float8 else products)
        rng = np.random.default_rng(N)
        labels = [np.sort(rng.choice(K, min(LABELS, K), replace=False)) for _ in range(N)]
        indptr = np.concatenate([[0], np.cumsum([len(x) for x in labels])])
        self.positives = Positives.of([(indptr, np.concatenate(labels))], device)

    def wide(self) -> Tensor:
        """Give the weights in float64."""
        return self.weight.double() / (32 if self.weight.dtype == FLOAT8 else 1)

    def narrow(self) -> Scaled | None:
        """Give the hidden vectors of which outputs are products of float8, if they are."""
        return scaled(self.hidden) if self.in_float8 else None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Give the seconds of a call: the median of three means, after two calls to warm up."""
    call()
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    n = max(1, min(100, int(least / 3 / (time.perf_counter() - began))))
    means = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(n):
            call()
        wait(device)
        means.append((time.perf_counter() - began) / n)
    return sorted(means)[1]


def truth_of(problem: Problem, loss: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give by autograd in float64 the loss and the gradients of hidden vectors, weights and bias; straight through rounding."""
    leaves = [x.double().requires_grad_() for x in (problem.hidden[0], problem.wide()[0], problem.bias[0])]
    z = leaves[0] @ leaves[1].T + leaves[2]
    if (narrow := problem.narrow()) is not None:
        seen = narrow.values.double() * narrow.scales.double()[..., None]
        z = z + ((seen[0] - leaves[0]) @ leaves[1].T).detach()
    y = torch.zeros_like(z)
    y[problem.positives.samples, problem.positives.buckets] = 1
    if loss == "logistic":
        value = torch.nn.functional.softplus(z, threshold=1e9).sum() - (y * z).sum()
    elif loss == "squared-hinge":
        value = (1 - (2 * y - 1) * z).clamp(min=0).square().sum()
    else:
        value = -(y / y.sum(1, keepdim=True) * torch.log_softmax(z, 1)).sum()
    value = value / len(z)
    value.backward()
    return (value.detach(), *(x.grad for x in leaves))


def of_value(problem: Problem) -> float:
    """Give the error allowed to the loss; Hopper's own sums of products of float8 have some 14 bits within a slice."""
    return 1e-4 if problem.in_float8 else 1e-5


def check(device: torch.device, sizes: list[tuple[int, int, int]]) -> None:
    """Print the largest errors of the fused step, in units of the largest number of each kind."""
    print("| K, D, N | weights | loss | value | grad hidden | grad bias | weights, in steps of their storage | within |")
    print("|---|---|---|---|---|---|---|---|")
    for K, D, N in sizes:
        for mode, (storage, products) in MODES.items():
            for loss in ("logistic", "squared-hinge", "softmax"):
                problem, rule = Problem(K, D, N, storage, products, device), sgd(weight_decay=0.1)
                if products != storage == torch.float32:
                    problem.weight.copy_(problem.weight.to(products))  # what products are taken of
                truth, old = truth_of(problem, loss), problem.wide()[0]
                hidden, bias, value = fused_step(
                    problem.hidden, problem.weight, problem.bias, problem.positives,
                    loss=loss, rule=rule, state=State(), want_loss=True, chunk_bytes=1 << 20, narrow=problem.narrow(),
                )  # fmt: skip
                pairs = ((value, truth[0][None]), (hidden[0], truth[1]), (bias[0], truth[3]))
                errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
                asked = (1 - rule.rate * rule.weight_decay) * old - rule.rate * truth[2]
                apart = (problem.wide()[0] - asked).abs()
                allowed = 4e-3 if problem.hidden.dtype == torch.bfloat16 else 2e-5  # for the rounding of the outputs' gradients
                apart -= rule.rate * float(truth[2].abs().max()) * allowed
                digits, least = {torch.bfloat16: (7, 0.0), FLOAT8: (3, 2.0**-14)}.get(storage, (22, 0.0))
                steps = float((apart.clamp(min=0) / (asked.abs() * 2.0**-digits).clamp(min=max(least, 1e-9))).max())
                fits = max(errors[1:]) < allowed and errors[0] < of_value(problem) and steps <= 1.01
                cells = [f"{K:,}, {D}, {N}", mode, loss, *(f"{e:.1e}" for e in errors), f"{steps:.2f}", "yes" if fits else "NO"]
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nBits of the rounding as specified: {'yes' if rounds_as_specified(device) else 'NO'}")


def check_chunked(device: torch.device, sizes: list[tuple[int, int, int]]) -> None:
    """Print how far the fused step with outputs in float8 is from the chunked one in float32, which only simulates that."""
    print("\n| K, D, N | loss | value | grad hidden | within |\n|---|---|---|---|---|")
    for K, D, N in sizes:
        for loss in ("logistic", "squared-hinge", "softmax"):
            problem = Problem(K, D, N, FLOAT8, FLOAT8, device)
            head = LinearHead(problem.weight, problem.bias, in_float8=True)
            how: dict[str, Any] = {"loss": loss, "want_loss": True}
            hidden, value = head.step(problem.hidden.float(), problem.positives, update=lambda *_: None, **how)
            assert value is not None
            ours, _, of_ours = fused_step(
                problem.hidden, problem.weight, problem.bias, problem.positives,
                rule=sgd(), state=State(), chunk_bytes=1 << 20, narrow=problem.narrow(), **how,
            )  # fmt: skip
            assert of_ours is not None
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in ((of_ours, value), (ours, hidden))]
            fits = errors[0] < of_value(problem) and errors[1] < 4e-3
            print(f"| {K:,}, {D}, {N} | {loss} | {errors[0]:.1e} | {errors[1]:.1e} | {'yes' if fits else 'NO'} |", flush=True)


def rounds_as_specified(device: torch.device) -> bool:
    """Compare decayed bfloat16 weights with the specification, computed in int64."""
    problem, rule = Problem(500, 100, 4, torch.bfloat16, torch.bfloat16, device), sgd(rate=0.5, weight_decay=0.5)
    problem.bias.fill_(-1e4)  # no gradient: weights only decay, exactly
    positives = Positives(*(x[:0] for x in (problem.positives.repetitions,) * 3), torch.zeros_like(problem.positives.counts_RN))
    decayed = (problem.weight[0].double() * (1 - rule.rate * rule.weight_decay)).float()
    fused_step(
        problem.hidden, problem.weight, problem.bias, positives,
        loss="logistic", rule=rule, state=State(), want_loss=False, chunk_bytes=1 << 20,
    )  # fmt: skip
    mask, golden = 0xFFFFFFFF, 0x9E3779B1

    def mixed(x: Tensor) -> Tensor:
        x = (x ^ x >> 16) * 0x7FEB352D & mask
        x = (x ^ x >> 15) * 0x846CA68B & mask
        return x ^ x >> 16

    seed = torch.tensor(rule.seed, device=device)
    key = mixed(mixed((seed & mask) ^ mixed(((seed >> 32) + rule.step * golden) & mask)))
    rows = mixed(key ^ (torch.arange(500, device=device) * golden & mask))
    u = (rows[:, None] + torch.arange(100, device=device) * golden) & mask
    bits = (decayed.view(torch.int32).long() & mask) + (u >> 16)
    return bool((problem.weight[0].view(torch.int16).long() & 0xFFFF == bits >> 16).all())


def ceilings(device: torch.device, n: int, n_copied: int) -> tuple[dict[torch.dtype, float], float]:
    """Give the operations a second of a product of n x n matrices, and the bytes a second that a copy reads and writes."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / seconds_of(lambda a=a, b=b: a @ b, device)
        print(f"product of {n} x {n}, {dtype}: {rates[dtype] / 1e12:.3g} TFLOP/s", flush=True)
    rates[FLOAT8] = max(rates[torch.bfloat16], *(eighth_rate(device, n, is_fast) for is_fast in (False, True)))
    x = torch.zeros(n_copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * n_copied / seconds_of(lambda: y.copy_(x), device)
    print(f"copy of {n_copied / 2**30:.3g} GiB, read and written: {bandwidth / 1e9:,.0f} GB/s\n", flush=True)
    return rates, bandwidth


def eighth_rate(device: torch.device, n: int, is_fast: bool) -> float:
    """Give the operations a second of torch's product of float8, with sums in float32 or those of the tensor cores; 0 without."""
    a, b = (torch.randn(n, n, device=device).to(FLOAT8) for _ in range(2))
    one, name = torch.ones((), device=device), f"product of {n} x {n}, {FLOAT8}, {'fast' if is_fast else 'float32'} sums"

    def call() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_fast)

    try:
        rate = 2 * n**3 / seconds_of(call, device)
    except Exception as error:  # neither documented nor there on every device
        print(f"{name}: {reason_of(error)}")
        return 0.0
    print(f"{name}: {rate / 1e12:.3g} TFLOP/s", flush=True)
    return rate


def fused(
    problem: Problem, loss: str = "logistic", blocks: triton_batch.Blocks | None = None, chunk_bytes: int = CHUNK_BYTES["cuda"]
) -> Callable[[], object]:
    """Give the step of the kernels."""
    rule, state = sgd(), State()
    return lambda: triton_step.step(
        problem.hidden, problem.weight, problem.bias, problem.positives,
        loss=loss, rule=rule, state=state, want_loss=False, chunk_bytes=chunk_bytes, blocks=blocks, narrow=problem.narrow(),
    )  # fmt: skip


def replayed(problem: Problem) -> Callable[[], object]:
    """Capture the fused step as a CUDA graph. It repeats one rate, step and set of positives: for timing what launches cost."""
    call, stream = fused(problem), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def chunked(problem: Problem) -> Callable[[], object]:
    """Take the head's own step in torch, updated in place and rounded to the nearest: cheaper than the fused one's rounding."""
    if problem.weight.dtype == FLOAT8:
        raise TypeError("torch adds no float8")
    head, rule = LinearHead(problem.weight, problem.bias), sgd()

    def update(name: str, part: slice, gradient: Tensor, copy: Tensor | None) -> None:
        values = (problem.weight if name == "head.weight" else problem.bias)[:, part]
        values.mul_(1 - rule.rate * rule.weight_decay).sub_(gradient, alpha=rule.rate)
        if copy is not None:
            copy[:, part].copy_(values)

    return lambda: head.step(problem.hidden, problem.positives, loss="logistic", update=update, want_loss=False)


def autograd(problem: Problem) -> Callable[[], object]:
    """All outputs and the whole gradient in memory, as a module of torch would have it."""
    if problem.weight.dtype == FLOAT8:
        raise TypeError("torch multiplies no float8 by bfloat16")
    products, rule = problem.hidden.dtype, sgd()
    weight, bias = problem.weight[0].requires_grad_(), problem.bias[0].requires_grad_()
    hidden = problem.hidden[0].clone().requires_grad_()
    samples, buckets = problem.positives.samples, problem.positives.buckets

    def step() -> None:
        with torch.enable_grad():
            z = torch.nn.functional.linear(hidden, weight.to(products), bias.to(products))
            loss = (torch.nn.functional.softplus(z).sum() - z[samples, buckets].sum()) / len(z)
            loss.backward()
        with torch.no_grad():
            for x in (weight, bias):
                x.mul_(1 - rule.rate * rule.weight_decay).sub_(x.grad, alpha=rule.rate)
        weight.grad = bias.grad = hidden.grad = None

    return step


def measure_alone(head: Callable[[Problem], Callable[[], object]], size: tuple[Any, ...]) -> tuple[float, int]:
    """Measure a head on a problem that is made for it and gone with it."""
    problem = Problem(*size)
    return measure(lambda: head(problem), problem.weight.device)


def measure(make: Callable[[], Callable[[], object]], device: torch.device) -> tuple[float, int]:
    """Give a call's seconds, and the bytes that it took at most beyond what was there before it was made."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    call = make()
    call()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(call, device)
    return seconds, (torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0)


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:80]}".replace("|", "/")


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(
    cases: list[tuple[int, int, int]], device: torch.device, rates: dict[torch.dtype, float], bandwidth: float, until: float
) -> None:
    print("| K, D, N | weights | head | floor, ms | step, ms | of the floor | peak beyond weights and batch, MiB |")
    print("|---|---|---|---|---|---|---|")
    for mode, (storage, products) in MODES.items():  # so that what time cuts off is the least of interest
        for K, D, N in cases:
            of_gradients = rates[torch.bfloat16 if products == FLOAT8 else products]
            by_products = 2 * N * K * D * (1 / rates[products] + 2 / of_gradients)
            by_memory = 3 * K * D * storage.itemsize / bandwidth
            floor = max(by_products, by_memory)
            which = "products" if by_products > by_memory else "memory"
            heads: dict[str, Callable[[Problem], Callable[[], object]]] = dict(fused=fused, chunked=chunked, autograd=autograd)
            if device.type == "cuda":
                heads["fused, as a CUDA graph"] = replayed
            if mode == "bfloat16":
                heads["fused, softmax"] = lambda problem: fused(problem, "softmax")
            for name, head in heads.items():
                row = [f"{K:,}, {D}, {N}", mode, name, f"{1e3 * floor:.3g} ({which})"]
                if time.perf_counter() > until:
                    print(f"| {' | '.join(row)} | no time left | | |", flush=True)
                    continue
                try:
                    seconds, peak = measure_alone(head, (K, D, N, storage, products, device))
                    row += [f"{1e3 * seconds:.3g}", f"{seconds / floor:.2f}", f"{peak / 2**20:,.0f}"]
                except Exception as error:  # one head's failure is a row, not the end
                    row += [reason_of(error), "", ""]
                release()
                print(f"| {' | '.join(row)} |", flush=True)


def by_kernel(case: tuple[int, int, int], mode: str, device: torch.device) -> None:
    """Print how a fused step's time divides among kernels."""
    print(f"\n| kernel, {mode} | ms a step |\n|---|---|")
    call = fused(Problem(*case, *MODES[mode], device))
    call()
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(3):
            call()
        wait(device)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) for event in profile.key_averages()}
    for name, microseconds in sorted(times.items(), key=lambda item: -item[1])[:8]:
        print(f"| {name[:60]} | {microseconds / 3e3:.3g} |", flush=True)


def try_blocks(case: tuple[int, int, int], mode: str, device: torch.device, until: float) -> None:
    """Print the time of a fused step for other sizes of its chunks and blocks."""
    K, D, N = case
    print(f"\nK = {K:,}, D = {D}, N = {N}, {mode}\n\n| with | step, ms |\n|---|---|")
    problem = Problem(*case, *MODES[mode], device)
    tried: dict[str, dict[str, Any]] = {f"chunks of {n >> 20} MiB": {"chunk_bytes": n} for n in CHUNKS}
    tried |= {name: {"blocks": blocks} for name, blocks in (TRIED_EIGHTH if problem.in_float8 else TRIED).items()}
    for name, how in tried.items():
        if time.perf_counter() > until:
            print(f"| {name} | no time left |")
            continue
        try:
            found = f"{1e3 * seconds_of(fused(problem, **how), device):.3g}"
        except Exception as error:  # too large for this device
            found = reason_of(error)
        print(f"| {name} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="only measure")
    parser.add_argument("--no-measure", action="store_true", help="only check")
    args = parser.parse_args()
    until = time.perf_counter() + 60 * args.minutes
    device = torch.device("cpu" if args.quick else "cuda:0")
    name = "CPU, interpreted" if args.quick else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}\n")
    torch.set_grad_enabled(False)
    cases = [(300, 40, 20)] if args.quick else CASES
    if not args.no_check:
        sizes = [(300, 40, 20), (300, 40, 140)] if args.quick else [(1000, 200, 100), (5000, 768, 128), (5003, 100, 300)]
        with torch.enable_grad():
            check(device, sizes)
        check_chunked(device, sizes)
        print()
    if args.no_measure:
        return
    rates, bandwidth = ceilings(device, *((256, 1 << 20) if args.quick else (8192, 1 << 32)))
    compare(cases, device, rates, bandwidth, until - 20 * args.minutes)  # a third of the time is left for the rest
    others = [(cases[i], "bfloat16") for i in (2, 3, 1) if i < len(cases)] or [(cases[0], "bfloat16")]
    for case, mode in [*others[:1], (others[0][0], "float8, outputs in float8"), *others[1:]]:
        release()
        try:
            by_kernel(case, mode, device)
            try_blocks(case, mode, device, until)
        except Exception as error:  # no profiler on this machine, say
            print(reason_of(error))


if __name__ == "__main__":
    main()
