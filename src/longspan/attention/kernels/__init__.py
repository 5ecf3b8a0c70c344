"""Block kernels: one visible table, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from longspan.attention.kernels.contract import Kernel
from longspan.attention.kernels.cpu_flash import CpuFlash
from longspan.attention.kernels.cuda_flash import CudaFlash
from longspan.attention.kernels.cudnn import Cudnn
from longspan.attention.kernels.flex import Flex
from longspan.attention.kernels.reference import Reference

__all__ = ["KERNELS", "Kernel", "pick"]

# In the order in which "auto" asks them.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "cudnn": Cudnn,
    "cuda_flash": CudaFlash,
    "cpu_flash": CpuFlash,
    "flex": Flex,
    "reference": Reference,
}

_log = logging.getLogger(__name__)


@cache
def _say_once(chosen: str, why: str, level: int) -> None:
    _log.log(level, "attention kernel %s: %s", chosen, why)


def pick(q: Tensor, *, softcap: float | None, name: str = "auto") -> Kernel:
    """The kernel of a name, or with "auto" the first of ``KERNELS`` that takes such queries.

    What "auto" chose, and why not an earlier one, is logged once, at level INFO; at WARNING for the
    reference, unless float64 asked for it.

    Args:
        q: queries (b, l, h, d) of any block; keys and values have their dtype, device and head dim.
        softcap: bound of the scores, or None.

    Raises:
        ValueError: the name is unknown, or that kernel does not take such queries.
    """
    if name != "auto":
        if name not in KERNELS:
            raise ValueError(f"unknown attention kernel {name!r}; known are auto, {', '.join(KERNELS)}")
        kernel = KERNELS[name]()
        reason = kernel.supports(q, q, q, softcap=softcap)
        if reason is not None:
            raise ValueError(f"kernel {name!r} cannot be used here: {reason}; take 'auto'")
        return kernel
    passed: list[str] = []
    for candidate in KERNELS.values():
        kernel = candidate()
        reason = kernel.supports(q, q, q, softcap=softcap)
        if reason is None:
            # The reference is slow and keeps whole score matrices: who gets it without asking for float64 should know.
            slow = kernel.name == "reference" and q.dtype != torch.float64
            _say_once(kernel.name, "; ".join(passed) or "the first choice", logging.WARNING if slow else logging.INFO)
            return kernel
        passed.append(f"not {kernel.name} ({reason})")
    raise ValueError(f"no attention kernel takes these queries: {'; '.join(passed)}")
