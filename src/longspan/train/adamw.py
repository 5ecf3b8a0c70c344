"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) in one pass over each parameter, for bf16 training.

The state is torch.optim.AdamW's. The gradient may be in another dtype and is scaled on its way in, so that clipping
takes no pass of its own. On CUDA each pass is one Triton kernel. With a 16-bit gradient, in bytes a parameter:

* `adamw_`: a fp32 master, fp32 moments, and a 16-bit working copy written in the same pass: 14 read, 14 written; apart,
  clipping, conversion, update and copy read 26 and write 22.
* `adamw_rounded_`: weights and moments in bf16, and nothing beside them: 8 read, 6 written. Rounded to the nearest,
  most updates would be lost (bf16 has 8 bits, a step changes a weight by a part in a thousand, and a second moment by
  1 - beta2 of itself); here each result goes up or down by chance, such that its mean is what was computed
  (stochastic rounding: Gupta et al. 2015, arXiv:1502.02551; for bf16 weights: Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

_CHUNK = 2**22  # elements whose fp32 values exist at one time on a CPU


class Hyper(NamedTuple):
    """What a step is taken with.

    Args:
        factor: (), fp64, on the gradient; below 1 where it is clipped. NaN: nothing is changed. On the parameter's
            device or on the host: a GPU's own is read there, and nobody waits for it.
        step: from 1 on.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    factor: Tensor
    step: int

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        return (1 - self.beta2**self.step) ** 0.5


@torch.no_grad()
def adamw_(master: Tensor, copy: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    """Updates a parameter, its copy and its two moments in place. All of one shape and contiguous but for `grad`."""
    if master.is_cuda:
        from longspan.train.adamw_cuda import adamw_cuda_

        adamw_cuda_(master, copy, grad.contiguous(), exp_avg, exp_avg_sq, hyper)
        return
    if hyper.factor.isnan():
        return
    _advance(master, grad.to(master.dtype), exp_avg, exp_avg_sq, hyper)
    copy.copy_(master)


@torch.no_grad()
def adamw_rounded_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper, seed: int) -> None:
    """Updates a bf16 parameter and its two bf16 moments in place, rounded by chance. All of one shape, and contiguous
    but for `grad`. The same seed, 0 to 2^31 - 1, gives the same values on one kind of device."""
    if weight.is_cuda:
        from longspan.train.adamw_cuda import adamw_rounded_cuda_

        adamw_rounded_cuda_(weight, grad.contiguous(), exp_avg, exp_avg_sq, hyper, seed)
        return
    if hyper.factor.isnan():
        return
    generator = torch.Generator().manual_seed(seed)
    chunks = (x.reshape(-1).split(_CHUNK) for x in (weight, grad, exp_avg, exp_avg_sq))
    for w, g, m, v in zip(*chunks, strict=True):
        wide = w.float(), m.float(), v.float()
        _advance(wide[0], g.float(), wide[1], wide[2], hyper)
        for part, new in zip((w, m, v), wide, strict=True):
            _round_into(part, new, generator)


def _advance(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    grad = grad * hyper.factor
    weight.mul_(1 - hyper.lr * hyper.weight_decay)
    exp_avg.lerp_(grad, 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    denominator = (exp_avg_sq.sqrt() / hyper.root_correction).add_(hyper.eps)
    weight.addcdiv_(exp_avg, denominator, value=-hyper.step_size)


def _round_into(to: Tensor, wide: Tensor, generator: torch.Generator) -> None:
    """Writes fp32 values into bf16: chance below what the 16 dropped bits hold carries into those that stay."""
    bits = wide.view(torch.int32)
    chance = torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32)
    to.copy_(((bits + chance) & -(2**16)).view(torch.float32))


def round_step(optimizer: AdamW, factor: Tensor, seed: int) -> None:
    """A step of an optimiser over bf16 parameters, sharded or not, by `adamw_rounded_`, from gradients times `factor`,
    as `Hyper` has it.

    Ranks that hold the same parameter round it alike, for chance hangs on `seed`, the step and the place of the
    parameter in the optimiser only.
    """
    for place, (parameter, grad, state, hyper) in enumerate(updates(optimizer, factor, lambda p: p.grad)):
        moments = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        chance = (seed * 1_000_003 + hyper.step * 100_003 + place) % 2**31
        adamw_rounded_(_local(parameter.data), _local(grad), *moments, hyper, chance)


def updates(
    optimizer: AdamW, factor: Tensor, gradient: Callable[[nn.Parameter], Tensor | None]
) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any], Hyper]]:
    """The parameters that have a gradient, with it, their state (of this step already) and what the step is taken with.

    State and moments are made where they are missing, the moments like their parameters.
    """
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        rates = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        hyper = None
        for parameter in group["params"]:
            grad = gradient(parameter)
            if grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the host: it is read there
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            step = int(state["step"])
            if hyper is None or hyper.step != step:
                hyper = Hyper(**rates, beta1=beta1, beta2=beta2, factor=factor, step=step)
            yield parameter, grad, state, hyper


def take_back(optimizer: AdamW, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
    """After `updates` with a factor that was NaN: the state is as before them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if gradient(parameter) is not None:
                optimizer.state[parameter]["step"] -= 1
                if not optimizer.state[parameter]["step"]:
                    del optimizer.state[parameter]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
