"""The GPU's visit of a row, run by Triton's interpreter on the CPU, against the CPU's own; in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install 'mach[gpu]')")
SCRIPT = """
import numpy as np, torch
from mach.data import CSR
from mach.encoders import make_batch
from mach.train import rows, rows_triton

rng, cpu = np.random.default_rng(0), torch.device("cpu")
keys = [3000000000, 7, 77]
for N, F, R, D, low in [(5, 7, 3, 9, False), (6, 4, 1, 16, True), (3, 5, 2, 1, False), (2, 3, 2, 4, False)]:
    chosen = rng.random((N, F)) < (0.0 if N == 2 else 0.5)
    values = rng.normal(size=int(chosen.sum())).astype(np.float32)
    csr = CSR(np.concatenate([[0], chosen.sum(1).cumsum()]), np.nonzero(chosen)[1].astype(np.int32), values, F)
    batch = make_batch(csr, normalize=False, device=cpu)
    weight, grad = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((F, R, D), (N, R, D)))
    second, found = torch.rand(F, R), []
    for kernel in (rows, rows_triton):
        mine = weight.clone(), second.clone()
        g = grad.bfloat16() if low else grad
        kernel.update_rows_of(*mine, batch, g, keys[:R], rate=0.1, beta=0.999, correction=0.3, epsilon=1e-8)
        found.append(mine)
    for ours, truth in zip(*found):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    assert chosen.sum() == 0 or not torch.equal(found[1][0], weight)
    if N != 2:  # rounded by the same numbers, but where sums in another order fall on another side of them
        stored = [weight.bfloat16(), weight.bfloat16(), weight.bfloat16().float()]
        for kernel, mine in zip((rows, rows_triton, rows_triton), stored):
            kernel.update_rows_of(mine, second.clone(), batch, g, keys[:R], rate=0.1, beta=0.999, correction=0.3, epsilon=1e-8)
        assert (stored[0] == stored[1]).float().mean() > 0.95 and not torch.equal(stored[1], weight.bfloat16())
        torch.testing.assert_close(stored[1].float(), stored[2], rtol=2.0**-7, atol=1e-6)
print("equal")
"""


def test_it_equals_the_visit_on_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "equal\n", done.stderr
