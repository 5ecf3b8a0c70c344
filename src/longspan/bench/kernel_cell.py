"""One cell of the kernel benchmark: a kernel on a problem, checked first and then measured.

Gate: out and all gradients against the formula in float64, at the full length or, where that is long, at a shorter one
of the same kind of mask; there some rows of out and dq are compared at the full length too. The tolerance is that of
``bench.exact``. What is not right has no times. Times are without the building of masks, which is a figure of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.attention.masks import Mask
from longspan.attention.patterns import block_sparse
from longspan.bench.attention_cell import DTYPES, Problem
from longspan.bench.contenders import CONTENDERS, Contender
from longspan.bench.exact import Inputs, excess, formula_by_rows, formula_of_rows, make_inputs
from longspan.bench.record import quartiles
from longspan.bench.timing import added_bytes, times_s

SPARSE = "block_sparse"
_SAMPLE = 8  # rows that are compared at the full length
_WARM_UP = 2
_MAX_BLOCKS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A problem of one sequence; ``block`` and ``ratio`` are those of a block-sparse mask, else None."""

    problem: Problem
    block: int | None = None
    ratio: float | None = None

    def make_mask(self) -> Mask:
        """The mask. Raises ValueError for one of so many blocks that making it takes minutes."""
        if self.block is None or self.ratio is None:
            return self.problem.make_mask()
        blocks = (-(-self.problem.length // self.block)) ** 2
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"a block-sparse mask may have at most {_MAX_BLOCKS:,} blocks here, got {blocks:,}")
        return block_sparse(self.problem.length, block=self.block, ratio=self.ratio, seed=self.problem.seed)

    def at(self, length: int) -> Task:
        """The same kind of mask at another length."""
        return replace(self, problem=replace(self.problem, length=length))


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCell:
    """One row of the benchmark: a task, a kernel, and what it runs on."""

    task: Task
    kernel: str
    device: str  # its name
    threads: int  # of torch, on the CPU


class _Answer(NamedTuple):
    mask: Mask
    inputs: Inputs
    exact: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]


def _problem_inputs(problem: Problem, device: torch.device) -> Inputs:
    return make_inputs(
        problem.length,
        h=problem.heads,
        g=problem.kv_heads,
        d=problem.head_dim,
        dtype=DTYPES[problem.dtype],
        device=device,
    )


@lru_cache(maxsize=1)
def _whole_answer(task: Task, device: torch.device) -> _Answer:
    mask, inputs = task.make_mask(), _problem_inputs(task.problem, device)
    return _Answer(mask, inputs, formula_by_rows(inputs.to(torch.float64), mask), formula_by_rows(inputs, mask))


def _sample(length: int) -> list[int]:
    return sorted({round(i * (length - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)})


@lru_cache(maxsize=1)
def _sampled_answer(task: Task, device: torch.device) -> _Answer:
    mask, inputs = task.make_mask(), _problem_inputs(task.problem, device)
    rows = _sample(task.problem.length)
    exact = formula_of_rows(inputs.to(torch.float64), mask, rows)
    return _Answer(mask, inputs, exact, formula_of_rows(inputs, mask, rows))


def measure(cell: KernelCell, device: torch.device, repetitions: int, gate_length: int) -> dict[str, Any]:
    """The row of a cell: "ok" with figures, "red" where it is wrong, "refused" or "failed", each with its reason."""
    try:
        return _measure(cell, device, repetitions, gate_length)
    except torch.OutOfMemoryError:
        return {"status": "refused", "reason": "the device's memory is too small for it"}
    except ValueError as error:
        return {"status": "refused", "reason": _line(error)}
    except RuntimeError as error:  # compilers and CUDA raise RuntimeErrors
        return {"status": "failed", "reason": _line(error)}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _measure(cell: KernelCell, device: torch.device, repetitions: int, gate_length: int) -> dict[str, Any]:
    task, problem = cell.task, cell.task.problem
    short = min(problem.length, gate_length)
    answer = _whole_answer(task.at(short), device)
    contender = CONTENDERS[cell.kernel](answer.mask, answer.inputs)
    off = excess((contender.forward(), *contender.backward()), answer.exact, answer.plain)
    if not off <= 1:
        return _red(off, short)
    sampled_off = None
    if short < problem.length:
        answer = _sampled_answer(task, device)
        contender = CONTENDERS[cell.kernel](answer.mask, answer.inputs)
        rows = _sample(problem.length)
        got = contender.forward()[:, rows], contender.backward()[0][:, rows]
        sampled_off = excess(got, answer.exact, answer.plain)
        if not sampled_off <= 1:
            return _red(sampled_off, problem.length)
    return {
        "status": "ok",
        "excess": off,
        "gate_length": short,
        "sampled_excess": sampled_off,
        "build_s": contender.build_s,
        **_figures(contender, device, repetitions),
        **flop(answer.mask, problem),
    }


def _red(off: float, length: int) -> dict[str, Any]:
    return {"status": "red", "reason": f"{off:.3g} times the error allowed against float64 at {length:,} tokens"}


def _figures(contender: Contender, device: torch.device, repetitions: int) -> dict[str, Any]:
    def both() -> tuple[Tensor, ...]:
        return (contender.forward(), *contender.backward())

    for _ in range(_WARM_UP):
        both()
    memory = {"forward_added_bytes": added_bytes(contender.forward, device), "added_bytes": added_bytes(both, device)}
    times = {
        "forward_s": quartiles(times_s(contender.forward, device, repetitions)),
        "backward_s": quartiles(times_s(contender.backward, device, repetitions)),
    }
    return memory | times


def flop(mask: Mask, problem: Problem) -> dict[str, float]:
    """Work of the allowed pairs alone: two matrix products forward, five backward."""
    forward = 4.0 * mask.area * problem.heads * problem.head_dim
    return {"forward_flop": forward, "backward_flop": 2.5 * forward}
