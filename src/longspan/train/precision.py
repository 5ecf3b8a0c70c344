"""Mixed precision on one rank without FSDP: bf16 weights for the computation, fp32 masters for the optimiser
(Micikevicius et al. 2017, arXiv:1710.03740, section 3.1).

The model's parameters stay what they are, fp32, for optimiser, checkpoints and export. While ``working``, the modules
hold bf16 copies in their places; ``settle`` puts the masters back and adds the copies' gradients to theirs, in fp32.

Bytes for n parameters, beside the optimiser's: 2·n for the copies; a step reads and writes 6·n to refresh them and
6·n for the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterWeights:
    """Keeps working copies of a model's parameters in ``dtype``; shared parameters have one copy."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False, remove_duplicate=False):
                if master not in copies:
                    copies[master] = nn.Parameter(torch.empty_like(master, dtype=dtype), master.requires_grad)
                self._places.append((module, name, master, copies[master]))
        self._masters, self._copies = list(copies), list(copies.values())
        self._working = False

    def work(self) -> None:
        """Puts copies of the masters' present values into the modules; does nothing while they are there."""
        if self._working:
            return
        with torch.no_grad():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                self._data(self._copies), self._data(self._masters)
            )
        self._place(working=True)

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the masters back and adds the gradients of the copies to theirs."""
        if not self._working:
            return
        self._place(working=False)
        for master, copy in zip(self._masters, self._copies, strict=True):
            if copy.grad is None:
                continue
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                master.grad += copy.grad
            copy.grad = None

    def _place(self, *, working: bool) -> None:
        for module, name, master, copy in self._places:
            module._parameters[name] = copy if working else master
        self._working = working

    @staticmethod
    def _data(parameters: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.data for parameter in parameters]
