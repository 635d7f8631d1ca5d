"""What follows the input layer: bias, ReLU, dropout and residual layers, R repetitions packed.

The first stage has neither weights nor products, only passes over memory, so forward and backward are one pass each on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mach.encoders.dropout import Dropout
from mach.gpu import takes_kernels
from mach.kernels import array_of, in_threads, jit_ieee, read, write

Update = Callable[[str, slice, Tensor, Tensor | None], None]  # see `mach.heads`


class MLP:
    """z (N, R, D) -> hidden vectors (R, N, D): h = relu(z + b), then h + relu(h W + b) for each further layer.

    parameters: `input.bias` (R, D) and, for layer i, `layers.i.weight` (R, D, D) and `layers.i.bias` (R, D).
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.bias = parameters["input.bias"]
        n_layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in parameters)
        self.layers = [(parameters[f"layers.{i}.weight"], parameters[f"layers.{i}.bias"]) for i in range(n_layers)]

    def forward(self, z_NRD: Tensor) -> Tensor:
        """Give the hidden vectors (R, N, D), nothing dropped."""
        hidden = torch.relu((z_NRD + self.bias).transpose(0, 1))
        for weight, bias in self.layers:
            hidden = hidden + torch.relu(torch.baddbmm(bias.unsqueeze(1), hidden, weight))
        return hidden

    def learn(self, z_NRD: Tensor, drop: Dropout | None, products: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Give the hidden vectors (R, N, D), in the type of the products, and what `backward` needs of the way to them."""
        hidden = self._first(z_NRD, drop, z_NRD.dtype if self.layers else products)
        kept = [hidden]
        for weight, bias in self.layers:
            low = hidden.to(products)
            step = torch.relu(torch.bmm(low, weight.to(products)) + bias.unsqueeze(1))
            step = step if drop is None else drop(step)
            kept += [low, step > 0]
            hidden = hidden + step
        return hidden.to(products), kept

    def backward(self, kept: list[Tensor], grad_RND: Tensor, drop: Dropout | None, update: Update) -> Tensor:
        """Give the gradient of z (N, R, D), in the type of the products, and update what lies between.

        The gradient of the hidden vectors is overwritten. An entry above zero was neither cut off by a ReLU nor dropped.
        """
        scale = 1.0 if drop is None else drop.scale
        for i in reversed(range(len(self.layers))):
            low, passed = kept[1 + 2 * i : 3 + 2 * i]
            grad_step = grad_RND * passed * scale
            grad_low = grad_step.to(low.dtype)
            grad_RND += torch.bmm(grad_low, self.layers[i][0].to(low.dtype).transpose(1, 2))
            update(f"layers.{i}.weight", slice(None), torch.bmm(low.transpose(1, 2), grad_low), None)
            update(f"layers.{i}.bias", slice(None), grad_step.sum(1), None)
        products = kept[1].dtype if self.layers else kept[0].dtype
        grad_z, grad_bias = self._first_backward(kept[0], grad_RND, scale, products)
        update("input.bias", slice(None), grad_bias, None)
        return grad_z.transpose(0, 1)

    def _first(self, z_NRD: Tensor, drop: Dropout | None, dtype: torch.dtype) -> Tensor:
        """Give relu(z + b), some dropped: (R, N, D), contiguous, in the type asked for."""
        N, R, D = z_NRD.shape
        if takes_kernels(z_NRD.device) and z_NRD.dtype == torch.float32:
            from mach.encoders import triton_kernels

            random = None if drop is None else drop.bytes(N, D)
            kept, scale = (256, 1.0) if drop is None else (drop.kept, drop.scale)
            return triton_kernels.first(z_NRD, self.bias, random, kept, scale, dtype)
        if z_NRD.device.type != "cpu":
            hidden = torch.relu((z_NRD + self.bias).transpose(0, 1))
            return (hidden if drop is None else drop(hidden)).to(dtype).contiguous()
        hidden = torch.empty(R, N, D, dtype=dtype)
        random = torch.empty(0, 0, 0, dtype=torch.uint8) if drop is None else drop.bytes(N, D)
        kept, scale = (256, 1.0) if drop is None else (drop.kept, drop.scale)
        arrays = [array_of(x) for x in (z_NRD.contiguous(), self.bias, random, hidden)]
        number = arrays[0].dtype.type(scale)
        in_threads(_first, [(*arrays, kept, number, r) for r in range(R)], torch.get_num_threads())
        return hidden

    @staticmethod
    def _first_backward(hidden_RND: Tensor, grad_RND: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Turn the gradient of what `_first` gave into that of z + b, of the type asked for, and its sum over the samples."""
        if takes_kernels(grad_RND.device) and grad_RND.dtype == torch.float32:
            from mach.encoders import triton_kernels

            return triton_kernels.first_backward(hidden_RND, grad_RND, scale, dtype)
        if grad_RND.device.type != "cpu":
            grad_RND.mul_(hidden_RND > 0).mul_(scale)
            return grad_RND.to(dtype), grad_RND.sum(1)
        R, _, D = grad_RND.shape
        grad_bias = torch.zeros(R, D, dtype=grad_RND.dtype)
        low = torch.empty(grad_RND.shape if dtype != grad_RND.dtype else (0, 0, 0), dtype=dtype)
        arrays = [array_of(x) for x in (hidden_RND, grad_RND, low, grad_bias)]
        number = arrays[1].dtype.type(scale)
        in_threads(_first_backward, [(*arrays, number, r) for r in range(R)], torch.get_num_threads())
        return low if len(low) else grad_RND, grad_bias


@jit_ieee
def _first(
    z_NRD: np.ndarray, bias_RD: np.ndarray, random_RND: np.ndarray, hidden_RND: np.ndarray, kept: int, scale: float, r: int
) -> None:
    N, _, D = z_NRD.shape
    bias = bias_RD[r]
    for n in range(N):
        z, out = z_NRD[n, r], hidden_RND[r, n]
        for d in range(D):
            write(out, d, max(z[d] + bias[d], scale * 0) * scale)
        if kept < 256:
            random = random_RND[r, n]
            for d in range(D):
                out[d] = out[d] if random[d] < kept else out[d] * 0


@jit_ieee
def _first_backward(
    hidden_RND: np.ndarray, grad_RND: np.ndarray, low_RND: np.ndarray, grad_bias_RD: np.ndarray, scale: float, r: int
) -> None:
    _, N, D = grad_RND.shape
    total = grad_bias_RD[r]
    for n in range(N):
        grad, hidden = grad_RND[r, n], hidden_RND[r, n]
        for d in range(D):
            grad[d] = grad[d] * scale if read(hidden[d]) > 0 else scale * 0
            total[d] += grad[d]
        if len(low_RND):
            low = low_RND[r, n]
            for d in range(D):
                write(low, d, grad[d])
