"""The helper that starts ranks: results come by rank, a failing rank is named, a hang ends, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import left_after
from tests.ranks import RankError, run_ranks


def _sum_of_ranks(rank: int, world: int, offset: torch.Tensor) -> torch.Tensor:
    value = offset + rank
    dist.all_reduce(value)
    assert torch.get_num_threads() == 1
    assert dist.get_world_size() == world
    return value


def _fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("the ring is broken here")
    dist.barrier()


def _hang(rank: int, world: int, pids: str) -> None:
    with open(f"{pids}/{rank}", "w") as file:
        child = subprocess.Popen(["sleep", "300"]) if rank == 0 else None
        file.write(f"{os.getpid()} {child.pid if child else os.getpid()}")
    if rank == 0:
        _sit_here()


def _sit_here() -> None:
    time.sleep(300)


def _die(rank: int, world: int) -> None:
    if rank == 2:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _warn(rank: int, world: int) -> None:
    warnings.warn("something is off", UserWarning, stacklevel=1)


def _rank(rank: int, world: int) -> tuple[int, int]:
    return rank, world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_come_back_by_rank(world: int) -> None:
    results = run_ranks(_sum_of_ranks, world, torch.tensor([10.0, 0.5]))
    expected = world * torch.tensor([10.0, 0.5]) + world * (world - 1) / 2
    assert len(results) == world
    for result in results:
        torch.testing.assert_close(result, expected)
    assert run_ranks(_rank, world) == [(rank, world) for rank in range(world)]


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 3 failed.*the ring is broken here") as caught:
        run_ranks(_fail_on_one, 3)
    assert caught.value.rank == 1
    assert "_fail_on_one" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_killed_rank_is_named_with_its_last_words() -> None:
    with pytest.raises(RankError, match=r"rank 2 of 3 failed: was killed by SIGKILL") as caught:
        run_ranks(_die, 3)
    assert "last words" in str(caught.value)


def test_a_hang_ends_and_says_where(tmp_path) -> None:
    start_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 had not returned after 3 s") as caught:
        run_ranks(_hang, 2, str(tmp_path), timeout_s=3)
    assert time.monotonic() - start_s < 100  # it would be 300
    assert "_sit_here" in str(caught.value)
    pids = {int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()}
    assert len(pids) == 3 and not left_after(pids)


def test_a_warning_in_a_rank_is_an_error_as_in_the_test_itself() -> None:
    with pytest.raises(RankError, match="something is off"):
        run_ranks(_warn, 1)


@pytest.mark.filterwarnings("ignore:something is off:UserWarning")
def test_a_filter_on_the_test_holds_in_its_ranks() -> None:
    assert run_ranks(_warn, 1) == [None]


def test_only_functions_that_ranks_can_import() -> None:
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda rank, world: rank, 1)
    with pytest.raises(ValueError, match="at least one"):
        run_ranks(_rank, 0)


class _SlowToLoad:
    """An argument that takes a rank three seconds to read, before it meets the others."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (3.0,)


def _given(rank: int, world: int, argument: object) -> object:
    return argument


def test_the_limit_is_of_what_ranks_do_once_they_have_met() -> None:
    assert run_ranks(_given, 2, _SlowToLoad(), timeout_s=2) == [None, None]


def _spent_s(rank: int, world: int) -> float:
    return time.process_time()


def test_starting_two_ranks_costs_little() -> None:
    # Processor time: other programs may be busy on this machine. A rank that imports torch spends several times this.
    spent_s = min(max(run_ranks(_spent_s, 2)) for _ in range(3))
    assert spent_s < 0.5, f"two ranks spent {spent_s} s before they met; is torch still preloaded in the server?"
