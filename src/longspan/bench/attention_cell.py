"""One cell of the attention benchmark: the exact answer to its problem, and one rank's part in measuring it.

Gate first: outputs and gradients of each rank against the formula in float64, at the full length, with the tolerance
of ``bench.exact``. Then one pass is counted by the kernel at the rank's interfaces, then passes are timed. The gate and
the counted passes are the warm-up. ``longspan.bench.attention`` starts this module once per rank and sends it cells
through a pipe; ranks meet through a file, so that no address need be known.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from longspan.attention.masks import Mask
from longspan.attention.patterns import make_pattern
from longspan.bench.exact import excess, formula_by_rows, make_inputs
from longspan.bench.network import counters, total
from longspan.bench.timing import release_memory
from longspan.context.attend import attend, prepare
from longspan.context.build import build, checked_schedule
from longspan.context.choose import Where, choose_layout
from longspan.context.run import Bound, bind, bound
from longspan.context.schedule import Sizes, bytes_sent
from longspan.hardware.devices import peak_memory_bytes, reset_peak_memory, resident_bytes
from longspan.hardware.profile import make_profile
from longspan.hardware.saved import saved_profile
from longspan.hardware.topology import lab, make_topology

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_PR_SET_PDEATHSIG = 1
PUBLISHED = ".published"  # after a method's name: without leaving out what the mask makes idle


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is computed, whoever computes it.

    Attributes:
        mask: a name of ``PATTERNS``.
        length: tokens of the global sequence.
        histogram: document lengths, as ``sample_lengths`` takes them; None: uniform from 1/32 to 1/4 of the length.
        seed: of the documents.

    Raises:
        ValueError: a size is below 1, or the query heads are no multiple of the KV heads.
    """

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    histogram: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.length, self.heads, self.kv_heads, self.head_dim
        if min(sizes) < 1:
            raise ValueError(f"length, heads, KV heads and head dim must be positive, got {sizes}; give at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"query heads must be a multiple of KV heads, got {self.heads} and {self.kv_heads}")

    def make_mask(self) -> Mask:
        """The mask; equal on every rank."""
        return make_pattern(self.mask, self.length, histogram=self.histogram, seed=self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One figure of the benchmark: a problem, a method, and where it runs.

    Attributes:
        layout: a name of a token layout; None takes the method's own.
        network: "port", "mesh" or "none".
        rate_bit_per_s: of each direction of each cable; None for no limit.
        threads: of each rank.
        cpu: cores that each rank may use at most; 0: what the machine has for it.
    """

    problem: Problem
    method: str
    layout: str | None
    ranks: int
    network: str
    rate_bit_per_s: float | None
    threads: int
    cpu: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A cell with what is needed to measure it."""

    cell: Cell
    answer: Path
    repetitions: int


def solve(problem: Problem, path: Path) -> None:
    """Writes inputs, the float64 answer and the plain formula's answer in the dtype that is judged."""
    mask, dtype = problem.make_mask(), DTYPES[problem.dtype]
    inputs = make_inputs(problem.length, h=problem.heads, g=problem.kv_heads, d=problem.head_dim, dtype=dtype)
    exact = formula_by_rows(inputs.to(torch.float64), mask)
    plain = exact if dtype == torch.float64 else formula_by_rows(inputs, mask)
    torch.save({"inputs": tuple(inputs), "exact": tuple(exact), "plain": tuple(plain)}, path)


class Meeting:
    """A barrier through the store's file: unlike ``dist.barrier`` it puts nothing on the wire that is counted."""

    def __init__(self, store: FileStore, rank: int, world: int) -> None:
        self.store, self.rank, self.world, self._numbers = store, rank, world, count()

    def wait(self) -> None:
        number = next(self._numbers)
        self.store.set(f"meeting/{number}/{self.rank}", "")
        self.store.wait([f"meeting/{number}/{rank}" for rank in range(self.world)])


def where(cell: Cell) -> Where:
    """What a cell runs on, for method "auto" to choose by: the network as it was made, the CPU as it was calibrated.

    Ranks that have a share of a core, or more of them than cores, compute so much slower than a profile that was
    measured alone says. Without a saved profile the preset is taken, which is of a core in such company.
    """
    share = cell.cpu or min(1.0, (os.cpu_count() or 1) / (cell.ranks * cell.threads))
    topology = make_topology("gloo", cell.ranks)
    if cell.network in ("port", "mesh") and cell.rate_bit_per_s is not None:
        topology = lab(cell.network, cell.ranks, cell.rate_bit_per_s, share)
    size = DTYPES[cell.problem.dtype].itemsize
    sizes = Sizes(head_dim=cell.problem.head_dim, inputs=size, sums=max(4, size))
    saved = saved_profile(torch.device("cpu"))
    device = saved.slowed(share) if saved else make_profile("cpu").slowed(cell.cpu or 1.0)
    return Where(topology=topology, device=device, sizes=sizes)


def measure(job: Job, meeting: Meeting) -> dict[str, Any]:
    """This rank's part of a cell, as plain values. Collective. A refusal or a red gate comes without any speed."""
    cell, problem = job.cell, job.cell.problem
    rank, world = dist.get_rank(), dist.get_world_size()
    mask, start_s = problem.make_mask(), time.perf_counter()
    method, layout = cell.method.removesuffix(PUBLISHED), cell.layout
    heads, kv_heads = problem.heads, problem.kv_heads
    pruned = method == cell.method
    try:
        if method == "auto" and layout is None and world > 1:
            layout, choice = choose_layout(mask, world, problem.heads, problem.kv_heads, where(cell))
            method = choice.chosen.method
        if pruned:
            handle = prepare(
                mask, num_heads=heads, num_kv_heads=kv_heads, method=method, layout=layout, where=where(cell)
            )
        else:
            whole = build(
                mask, world=world, rank=rank, num_heads=heads, num_kv_heads=kv_heads, method=method, layout=layout,
                pruned=False,
            )  # fmt: skip
            handle = bind(Bound(whole, dist.group.WORLD, None, None, "auto"))
    except ValueError as error:  # a method that does not take these heads, ranks or mask says so on every rank
        return {"status": "refused", "reason": str(error)}
    built = bound(handle).built
    build_s = time.perf_counter() - start_s
    answer = torch.load(job.answer, mmap=True)
    mine = torch.from_numpy(built.layout.positions(rank))
    q, k, v, dout = (x.index_select(1, mine) for x in answer["inputs"])
    exact, plain = ([x.index_select(1, mine) for x in answer[name]] for name in ("exact", "plain"))
    del answer
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward() -> Tensor:
        return attend(q, k, v, handle)

    def both() -> tuple[Tensor, ...]:
        out = forward()
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))

    off = excess(both(), exact, plain)
    worst = torch.tensor(off, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not worst <= 1:  # every rank stops here, or none
        return {"status": "red", "reason": f"{off:.3g} times the error allowed against float64", "excess": off}
    schedule = checked_schedule(mask, built.layout, built.method, problem.heads, problem.kv_heads, pruned=pruned)
    itemsize = q.itemsize
    sizes = Sizes(head_dim=problem.head_dim, inputs=itemsize, sums=max(4, itemsize))
    sent = [bytes_sent(phase, world, sizes)[rank] for phase in (schedule.forward, schedule.backward)]
    result: dict[str, Any] = {
        "status": "ok",
        "excess": off,
        "method": built.method,
        "layout": built.layout.name,
        "build_s": build_s,
        "forward_formula_bytes": sent[0],
        "both_formula_bytes": sum(sent),
    }
    release_memory()
    before = resident_bytes("cpu")
    reset_peak_memory("cpu")
    for name, step in (("forward", forward), ("both", both)):
        counted_bytes = _count(step, meeting)
        result[f"{name}_counted_bytes"] = None if cell.network == "none" else counted_bytes
    result["added_bytes"] = max(0, peak_memory_bytes("cpu") - before)
    for name, step in (("forward", forward), ("both", both)):
        result[f"{name}_s"] = _times(step, job.repetitions)
    return result


def _count(step: Callable[[], object], meeting: Meeting) -> int:
    """Payload that this rank sends in one step. Read when all ranks are done: then nothing is on its way any more."""
    meeting.wait()
    before = _sent()
    meeting.wait()
    step()
    meeting.wait()
    return _sent() - before


def _sent() -> int:
    """Payload over this host's cables so far; 0 where there is none, as on loopback."""
    return total(counters()).payload_bytes if shutil.which("ip") else 0


def _times(step: Callable[[], object], repetitions: int) -> list[float]:
    times_s = []
    for _ in range(repetitions):
        dist.barrier()
        start_s = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - start_s)
    return times_s


def main() -> int:
    """One rank: cells from the pipe, results into it, until the caller closes it."""
    pipe_number, rank, world, threads = (int(text) for text in sys.argv[1:5])
    store_path, timeout_s = sys.argv[5], float(sys.argv[6])
    if sys.platform == "linux":  # a caller that is killed takes its ranks along
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(threads)
    store = FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    meeting = Meeting(store, rank, world)
    with Connection(pipe_number) as pipe:
        pipe.send("ready")
        while True:
            try:
                job = pipe.recv()
            except (EOFError, ConnectionResetError):
                return 0
            pipe.send(measure(job, meeting))


if __name__ == "__main__":
    sys.exit(main())
