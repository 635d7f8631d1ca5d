"""Every kernel of Triton compiles for a GPU that need not be there: its interpreter takes what its compiler refuses.

In a process of its own, as Triton's functions are made for one way to run: launches there compile, for the arguments that they
were given, and run nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install 'mach[gpu]')")
COMPILES = """
import sys
import numpy as np, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
target, cpu = GPUTarget("cuda", int(sys.argv[1]), 32), torch.device("cpu")


def compile_instead(kernel, *args, grid, warmup, **meta):
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages") if name in meta}
    values = dict(zip(kernel.arg_names, args)) | meta
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            kind, constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = "*" + TYPES[value.dtype]
        else:
            kind = "fp32" if isinstance(value, float) else "i32"
        if kind[0] == "*" or (kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize):
            aligned[i,] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    if (what := (kernel.fn.__name__, str(signature), str(constants))) not in made:
        made[what] = triton.compile(source, target=target, options=options).asm["ptx"]


made, JITFunction.run = {}, compile_instead
"""
OF_ROWS = """
from mach.data import CSR
from mach.encoders import make_batch
from mach.train import rows_triton

batch = make_batch(CSR(np.array([0, 2, 3]), np.array([1, 3, 1], np.int32), None, 5), normalize=True, device=cpu)
weight, second = torch.zeros(5, 2, 16).bfloat16(), torch.zeros(5, 2)
rows_triton.update_rows_of(
    weight, second, batch, torch.zeros(2, 2, 16), [1, 2], rate=0.1, beta=0.9, correction=0.5, epsilon=1e-8
)
"""
OF_DECODING = """
from mach.decoding.device import triton_scan
from mach.decoding.scan import SUM
from mach.hashing.device import DeviceTable
from mach.hashing.table import LabelTable

triton_scan.is_interpreted = lambda: True  # so that it takes scores on a CPU
scan = triton_scan.TritonScan(torch.zeros(8, 4, 16), DeviceTable.of(LabelTable.hashed(3000, 16, 4), cpu), SUM, None, 512)
scan.maxima()
scan.block_scores(torch.arange(2), torch.zeros(2, 3, dtype=torch.int64))
"""
OF_HEADS = """
from mach.heads import Positives
from mach.heads.fused import fused_step
from mach.heads.rules import Rule, State
from mach.heads.scaled import scaled

R, B, D = 2, 300, 100
CASES = [
    (100, torch.bfloat16, "rowwise-adam", "logistic", False), (300, torch.bfloat16, "rowwise-adam", "softmax", False),
    (300, torch.float32, "adamw", "logistic", False), (300, torch.float8_e4m3fn, "sgd", "squared-hinge", True),
]
for N, storage, kind, loss, in_float8 in CASES:
    hidden, weight, bias = torch.zeros(R, N, D).bfloat16(), torch.zeros(R, B, D, dtype=storage), torch.zeros(R, B)
    moments = [torch.zeros(R, B, D) for _ in range(2)] if kind == "adamw" else [None, torch.zeros(R, B)]
    each = np.arange(N + 1), np.arange(N) % B
    fused_step(
        hidden, weight, bias, Positives.of([each] * R, cpu), loss=loss, want_loss=True, chunk_bytes=1 << 20,
        rule=Rule(kind=kind, rate=0.1, weight_decay=0.0, step=1, seed=1, repetitions=(0, 1)),
        state=State(first=moments[0], second=moments[1]), narrow=scaled(hidden) if in_float8 else None,
    )
"""
OF_ENCODERS = """
from mach.encoders import triton_kernels

R, N, D = 2, 3, 100
z, grad = torch.zeros(N, R, D), torch.zeros(R, N, D)
for dtype in (torch.float32, torch.bfloat16):
    triton_kernels.sum_rows(torch.zeros(7, R * D, dtype=dtype), *(torch.zeros(3, dtype=torch.int32),) * 2, torch.zeros(3))
    hidden = triton_kernels.first(z, torch.zeros(R, D), torch.zeros(R, N, D, dtype=torch.uint8), 200, 1.5, dtype)
    triton_kernels.first_backward(hidden, grad, 1.5, dtype)
"""
LAUNCHES = {
    "encoders, rows and decoding": (
        OF_ENCODERS + OF_ROWS + OF_DECODING,
        {"_first", "_first_backward", "_sum_rows", "_update", "block_maxima", "chosen_scores"},
    ),
    "heads": (
        OF_HEADS,
        {"apply_rule", "log_totals", "output_gradients", "positive_gradients", "row_moments", "slopes", "update_weights"},
    ),
}


@pytest.mark.parametrize("what", LAUNCHES)
def test_what_is_launched_compiles_for_hopper(what, tmp_path):
    launches, kernels = LAUNCHES[what]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{COMPILES}{launches}print(*sorted({{name for name, *_ in made}}))", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == sorted(kernels), done.stderr
