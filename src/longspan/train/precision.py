"""What a plan computes in; and mixed precision on one rank without FSDP: bf16 weights for the computation, fp32 masters
for the optimiser (Micikevicius et al. 2017, arXiv:1710.03740, section 3.1).

The model's parameters stay what they are, fp32, for checkpoints and export. While ``working``, the modules hold bf16
copies in their places, which the gradients are of. ``update`` takes an optimiser step in one pass over both; ``settle``
puts the masters back and adds the copies' gradients to theirs, in fp32, for several micro-batches or for whoever wants
to look at them.

Bytes for n parameters, beside the optimiser's: 2·n for the copies. Frozen weights that nobody saves (those beside
adapters) have no master: they become what the computation takes, 2 bytes each in place of 6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from longspan.plan.plan import Precision
from longspan.train.adamw import adamw_, take_back, updates


def compute_dtype(precision: Precision) -> torch.dtype:
    """Of products and activations, for a precision that is resolved ("auto" is not)."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}[precision]


class MasterWeights:
    """Keeps working copies of a model's parameters in ``dtype``; shared parameters have one copy.

    Args:
        keep_frozen: what is not trained keeps its own values for checkpoints and export; else it is cast for good.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, keep_frozen: bool) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False, remove_duplicate=False):
                if not (master.requires_grad or keep_frozen):
                    master.data = master.data.to(dtype)
                    continue
                if master not in copies:
                    copies[master] = nn.Parameter(torch.empty_like(master, dtype=dtype), master.requires_grad)
                self._places.append((module, name, master, copies[master]))
        self._copies = copies
        self._fresh: dict[nn.Parameter, int] = {}  # masters whose copies are theirs, by the version of their values
        self._working = False

    def work(self) -> None:
        """Puts copies of the masters' present values into the modules; does nothing while they are there."""
        if self._working:
            return
        stale = [master for master in self._copies if self._fresh.get(master) != master._version]
        if stale:
            with torch.no_grad():
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [self._copies[master].data for master in stale], [master.data for master in stale]
                )
            self._note(stale)
        self._place(working=True)

    def settle(self) -> None:
        """Puts the masters back and adds the gradients of the copies to theirs."""
        if not self._working:
            return
        self._place(working=False)
        self._take_gradients()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for master, copy in self._copies.items():
            if copy.grad is None:
                continue
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                master.grad += copy.grad
            copy.grad = None

    def update(self, optimizer: AdamW, factor: Tensor) -> None:
        """A step of the optimiser, whose parameters are the masters, from gradients times ``factor`` (as
        `adamw.Hyper` has it) of copies or, after ``settle``, of masters; the masters are back then, the copies theirs.
        The gradients stay, for ``take_back``; else ``drop_gradients``."""
        updated = []
        for master, grad, state, hyper in updates(optimizer, factor, self._gradient):
            copy = self._copies[master]
            adamw_(master.data, copy.data, grad, state["exp_avg"], state["exp_avg_sq"], hyper)
            updated.append(master)
        self._note(updated)
        self._place(working=False)

    def take_back(self, optimizer: AdamW) -> None:
        """After an ``update`` whose factor was NaN: everything is as ``settle`` leaves it."""
        take_back(optimizer, self._gradient)
        self._take_gradients()

    def drop_gradients(self) -> None:
        for master, copy in self._copies.items():
            master.grad = copy.grad = None

    def _gradient(self, master: nn.Parameter) -> Tensor | None:
        return self._copies[master].grad if master.grad is None else master.grad

    def _note(self, masters: list[nn.Parameter]) -> None:
        self._fresh |= {master: master._version for master in masters}

    def _place(self, *, working: bool) -> None:
        for module, name, master, copy in self._places:
            module._parameters[name] = copy if working else master
        self._working = working
