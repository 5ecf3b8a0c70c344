"""What a training step cannot go below on this device: its linears, its attention and its optimiser, each timed alone.

Linears: for each matrix of a layer, and the head, the product of the forward and the two of the backward, by F.linear
and autograd, on as many tokens as the step has. Attention: the fastest of torch's own kernels on a causal mask, forward
and backward. Optimiser: the faster of torch's fused AdamW and ours, for fp32 weights and moments, and for those in the
dtype of the computation alone. Norms, activations, rotations, embedding, softmax of the loss, clipping and all launches
are free, and nothing is computed twice: a step is always above it.

Model FLOPs a token are 6·N + 6·L·h·d·s for N parameters (a tied matrix once), L layers of h·d query channels and s
tokens: attention counts its causal half. MFU is that over the device's dense peak.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.bench.timing import times_s
from longspan.model.config import DecoderConfig
from longspan.model.cost import parameters
from longspan.train.adamw import Hyper, adamw_, adamw_rounded_

_ROWS = 16384  # of the head at a time: its logits are large
_SUSTAINED_S = 1.0  # of work before times are taken: a GPU that has just begun runs at clocks that it cannot keep
_REPETITIONS = 5
_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


class Floor(NamedTuple):
    """Seconds of a step's parts, each alone; and the name of the attention kernel that was fastest.

    ``optimiser_s`` is over fp32 weights and moments, ``pure_optimiser_s`` over those in the dtype of the computation.
    """

    linears_s: float
    attention_s: float
    optimiser_s: float
    pure_optimiser_s: float
    attention_kernel: str

    @property
    def step_s(self) -> float:
        return self.linears_s + self.attention_s + self.optimiser_s

    @property
    def pure_step_s(self) -> float:
        return self.linears_s + self.attention_s + self.pure_optimiser_s


def model_flops(config: DecoderConfig, length: int) -> float:
    """Of one training step on a causal sequence of ``length`` tokens."""
    channels = config.attention.num_heads * config.attention.head_dim
    return length * (6.0 * sum(parameters(config).values()) + 6.0 * config.num_layers * channels * length)


def _median_s(step: Callable[[], object], device: torch.device) -> float:
    step()
    once = statistics.median(times_s(step, device, 1))
    calls = max(1, round(_SUSTAINED_S / _REPETITIONS / once)) if device.type == "cuda" else 1
    return statistics.median(times_s(step, device, 2 * _REPETITIONS, calls=calls)[_REPETITIONS:])


def _linears_s(sizes: list[tuple[int, int]], rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward of linears (in, out), one after another."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for inputs, outputs in sizes:
        x = torch.randn(rows, inputs, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype, requires_grad=True)
        calls.append((x, weight, torch.randn(rows, outputs, device=device, dtype=dtype)))

    def step() -> None:
        for x, weight, grad in calls:
            torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    return _median_s(step, device)


def _attention_s(config: DecoderConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Forward and backward of one layer's attention by the fastest kernel, and its name."""
    attention = config.attention
    q, grad = (
        torch.randn(1, attention.num_heads, length, attention.head_dim, device=device, dtype=dtype) for _ in range(2)
    )
    k, v = (torch.randn(1, attention.kv_heads, length, attention.head_dim, device=device, dtype=dtype) for _ in "kv")
    for x in (q, k, v):
        x.requires_grad_()

    def step() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), grad)

    found: list[tuple[float, str]] = []
    for backend in _BACKENDS:
        if backend is SDPBackend.MATH and found:  # holds the whole matrix: for devices that have nothing else
            break
        with sdpa_kernel(backend):
            try:
                found.append((_median_s(step, device), backend.name.lower()))
            except RuntimeError:  # not for this device or these sizes
                continue
    return min(found)


def _optimiser_s(num_parameters: int, device: torch.device, dtype: torch.dtype, kept: torch.dtype) -> float:
    """AdamW of so many parameters, in pieces as a model has them, from gradients in ``dtype``; weights and moments are
    ``kept``."""
    pieces = [torch.zeros(size, device=device, dtype=kept) for size in _pieces(num_parameters)]
    for piece in pieces:
        piece.requires_grad_()
        piece.grad = torch.ones_like(piece)
    optimizer = torch.optim.AdamW(pieces, fused=True)
    theirs = _median_s(optimizer.step, device)
    states = [(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in pieces]
    for piece in pieces:
        piece.grad = None
    grads = [torch.ones_like(piece, dtype=dtype) for piece in pieces]
    copies = [torch.empty_like(piece, dtype=dtype) for piece in pieces]
    one = torch.ones((), dtype=torch.float64, device=device)
    hyper = Hyper(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, factor=one, step=10)

    def ours() -> None:
        for piece, copy, grad, state in zip(pieces, copies, grads, states, strict=True):
            if kept == torch.bfloat16:
                adamw_rounded_(piece.data, grad, *state, hyper, 0)
            else:
                adamw_(piece.data, copy, grad, *state, hyper)

    return min(theirs, _median_s(ours, device))


def _pieces(total: int, largest: int = 2**24) -> list[int]:
    return [min(largest, total - start) for start in range(0, total, largest)]


def measure_floor(config: DecoderConfig, length: int, device: torch.device, dtype: torch.dtype) -> Floor:
    """The floor of a step on one causal sequence of ``length`` tokens, of a decoder without experts."""
    attention, width, inner = config.attention, config.hidden_size, config.mlp.inner_size
    channels, kv_channels = attention.num_heads * attention.head_dim, attention.kv_heads * attention.head_dim
    layer = [(width, channels), (width, kv_channels), (width, kv_channels), (channels, width)]
    layer += [(width, inner)] * (2 if config.mlp.gated else 1) + [(inner, width)]
    linears = config.num_layers * _linears_s(layer, length, device, dtype)
    gc.collect()
    for rows in {min(_ROWS, length), length % _ROWS if length > _ROWS else 0} - {0}:
        times = length // _ROWS if rows == _ROWS else 1
        linears += times * _linears_s([(width, config.vocab_size)], rows, device, dtype)
    gc.collect()
    attention_s, kernel = _attention_s(config, length, device, dtype)
    gc.collect()
    num_parameters = sum(parameters(config).values())
    optimiser = _optimiser_s(num_parameters, device, dtype, torch.float32)
    gc.collect()
    pure = optimiser if dtype == torch.float32 else _optimiser_s(num_parameters, device, dtype, dtype)
    return Floor(linears, config.num_layers * attention_s, optimiser, pure, kernel)
