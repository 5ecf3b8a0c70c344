"""What the kernel benchmark sets against each other: our block kernels on bands, and torch's own attention.

Ours do what ``longspan.context.attention`` does with one rank: results in the inputs' dtype, and a backward that starts
with rowsum(dout * out). Torch's fused kernels know "full" and "causal"; where one takes a dense mask, it gets it. A
contender that cannot take a problem raises ValueError with the reason: the rule, and what it was given.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.attention.bands import Bands
from longspan.attention.kernels import KERNELS
from longspan.attention.kernels.calls import plan_calls, plan_windows
from longspan.attention.kernels.contract import row_sums
from longspan.attention.kernels.cudnn import MIN_SQUARE
from longspan.attention.kernels.flex import SHAPES, compiled
from longspan.attention.masks import Mask, causal, full
from longspan.bench.exact import Inputs
from longspan.hardware.devices import devices

_MAX_BANDS = 1 << 15  # cutting more of them into calls takes minutes
_MAX_CALLS = 1 << 14
_REFERENCE_SCORES = 1 << 28  # heads x pairs in float64: 2 GiB a matrix


def _refuse_size(num_bytes: float, what: str, device: torch.device) -> None:
    """Refuses a tensor that takes more than half of the device's memory."""
    limit = _memory_bytes(device) // 2
    if num_bytes > limit:
        raise ValueError(
            f"{what} must fit into half of the memory, {limit / 2**30:.1f} GiB, got {num_bytes / 2**30:.1f} GiB"
        )


@cache
def _memory_bytes(device: torch.device) -> int:
    index = device.index or 0
    return next(d.memory_bytes for d in devices() if (d.kind, d.index) == (device.type, index))


class Contender(ABC):
    """A kernel prepared for one mask and one set of inputs.

    Attributes:
        build_s: seconds from the mask's bands to what the kernel takes (calls, a dense mask, a block mask).
    """

    def __init__(self, mask: Mask, inputs: Inputs) -> None:
        self.mask, self.inputs = mask, inputs
        self.refuse()
        start_s = time.perf_counter()
        self.build()
        if inputs.q.device.type == "cuda":
            torch.cuda.synchronize(inputs.q.device)
        self.build_s = time.perf_counter() - start_s

    @abstractmethod
    def refuse(self) -> None:
        """Raises ValueError for what it cannot take."""

    @abstractmethod
    def build(self) -> None:
        """Prepares the mask."""

    @abstractmethod
    def forward(self) -> Tensor:
        """out (b s h d), in the inputs' dtype; what the backward needs of it is kept."""

    @abstractmethod
    def backward(self) -> tuple[Tensor, ...]:
        """dq, dk, dv of the latest forward, in the inputs' dtype."""


# How each of our kernels cuts bands into calls.
_PLANS: dict[str, Callable[[Bands], int]] = {
    "cudnn": lambda bands: len(plan_windows(bands, MIN_SQUARE)),
    "cuda_flash": lambda bands: len(plan_windows(bands)),
    "cpu_flash": lambda bands: len(plan_calls(bands)),
    "flex": lambda bands: 1,
    "reference": lambda bands: 1,
}


class Ours(Contender):
    """One of ``attention.kernels.KERNELS`` on the whole sequence as one block."""

    def __init__(self, name: str, mask: Mask, inputs: Inputs) -> None:
        self.name, self.kernel = name, KERNELS[name]()
        self.options = {"scale": inputs.q.shape[3] ** -0.5, "softcap": None}
        super().__init__(mask, inputs)

    def refuse(self) -> None:
        q, bands = self.inputs.q, self.mask.bands
        reason = self.kernel.supports(*self.inputs[:3], softcap=None)
        if reason is not None:
            raise ValueError(reason)
        scores = q.shape[2] * self.mask.num_tokens**2
        if self.name == "reference" and scores > _REFERENCE_SCORES:
            raise ValueError(f"the reference is for at most {_REFERENCE_SCORES:,} heads x pairs, got {scores:,}")
        if len(bands) > _MAX_BANDS:
            raise ValueError(f"a mask must have at most {_MAX_BANDS:,} bands to be cut into calls, got {len(bands):,}")

    def build(self) -> None:
        for plan in (plan_calls, plan_windows):
            plan.cache_clear()  # so that it is the building that is timed
        num_calls = _PLANS[self.name](self.mask.bands)
        if num_calls > _MAX_CALLS:
            raise ValueError(f"a pass may take at most {_MAX_CALLS:,} calls here, got a mask that takes {num_calls:,}")

    def forward(self) -> Tensor:
        out, lse = self.kernel.forward(*self.inputs[:3], self.mask.bands, **self.options)
        self._kept = out.to(self.inputs.q.dtype), lse
        return self._kept[0]

    def backward(self) -> tuple[Tensor, ...]:
        (out, lse), dout = self._kept, self.inputs.dout
        delta = row_sums(dout, out.to(lse.dtype))
        grads = self.kernel.backward(dout, *self.inputs[:3], lse, delta, self.mask.bands, **self.options)
        return tuple(x.to(dout.dtype) for x in grads)


class Torch(Contender):
    """Attention of torch itself with its autograd, on (b h s d) views."""

    def build(self) -> None:
        self.leaves = [x.detach().transpose(1, 2).requires_grad_() for x in self.inputs[:3]]
        self.grouped = self.leaves[0].shape[1] != self.leaves[1].shape[1]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b h s d)"""

    def forward(self) -> Tensor:
        with torch.enable_grad():
            self._out = self.attend(*self.leaves)
        return self._out.detach().transpose(1, 2)

    def backward(self) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(self._out, self.leaves, self.inputs.dout.transpose(1, 2), retain_graph=True)
        return tuple(x.transpose(1, 2) for x in grads)


class Sdpa(Torch):
    """``scaled_dot_product_attention`` held to one back end."""

    def __init__(self, backend: SDPBackend, masked_on: tuple[str, ...], mask: Mask, inputs: Inputs) -> None:
        self.backend, self.masked_on = backend, masked_on
        super().__init__(mask, inputs)

    def refuse(self) -> None:
        device, n = self.inputs.q.device, self.mask.num_tokens
        self.causal = self.mask == causal(n)
        self.masked = not self.causal and self.mask != full(n)
        if device.type == "cpu" and self.backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            raise ValueError("it takes CUDA tensors, not cpu")
        if self.masked and device.type not in self.masked_on:
            raise ValueError(f"on {device.type} it takes a full or a causal mask only, not another one")
        itemsize = self.inputs.q.itemsize
        if self.masked:
            _refuse_size(n * n * (1 + itemsize), "a dense mask", device)
        if self.backend is SDPBackend.MATH:
            # Scores, weights and their gradients.
            _refuse_size(4 * self.inputs.q.shape[2] * n * n * max(4, itemsize), "matrices of scores", device)

    def build(self) -> None:
        super().build()
        self.added = None
        if self.masked:  # a bool mask would be turned into this one in every call
            forbidden = ~self.mask.dense().to(self.inputs.q.device)
            self.added = torch.zeros_like(forbidden, dtype=self.inputs.q.dtype).masked_fill_(forbidden, -torch.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.grouped
        if grouped and self.backend is SDPBackend.EFFICIENT_ATTENTION:  # knows no groups
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False
        with sdpa_kernel(self.backend), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=self.added, is_causal=self.causal, enable_gqa=grouped
                )
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                why = "; ".join(str(each.message).partition(" (Triggered")[0] for each in said)
                raise ValueError(f"torch has no such kernel for these tensors: {why or error}") from None


class TorchFlex(Torch):
    """Compiled ``flex_attention`` with a block mask made from the dense mask."""

    def refuse(self) -> None:
        device, n = self.inputs.q.device, self.mask.num_tokens
        if device.type != "cuda":
            raise ValueError(f"flex attention has no backward on {device.type}, only on cuda")
        if n * n > torch.iinfo(torch.int32).max:
            raise ValueError(f"its kernels index the dense mask in 32 bits, which {n:,} tokens overflow")
        _refuse_size(10 * n * n, "the dense mask and torch's way from it to a block mask", device)

    def build(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        super().build()
        n, device, dense = self.mask.num_tokens, self.inputs.q.device, self.mask.dense().to(self.inputs.q.device)
        self.blocks = create_block_mask(lambda b, h, i, j: dense[i, j], None, None, n, n, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"block_mask": self.blocks, "enable_gqa": self.grouped}
        with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
            return compiled()(q, k, v, kernel_options={"BACKEND": "TRITON"}, **options)


CONTENDERS: dict[str, Callable[[Mask, Inputs], Contender]] = {
    **{name: partial(Ours, name) for name in KERNELS},
    "torch_flash": partial(Sdpa, SDPBackend.FLASH_ATTENTION, ("cpu",)),
    "torch_cudnn": partial(Sdpa, SDPBackend.CUDNN_ATTENTION, ()),
    "torch_efficient": partial(Sdpa, SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "torch_math": partial(Sdpa, SDPBackend.MATH, ("cpu", "cuda")),
    "torch_flex": TorchFlex,
}
