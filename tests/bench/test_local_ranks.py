"""Checks on ranks: what passes, what fails, and that neither a hang nor a death stops the caller."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.bench import channels
from longspan.bench.local_ranks import JOIN, Ranks, run_checks
from tests.processes import lives

CPU = torch.device("cpu")
LATE_S = 8.0  # of ranks that never answer: twenty times what they need to start and to meet


def _says(group: dist.ProcessGroup, device: torch.device) -> str:
    return f"{dist.get_world_size(group)} on {device}"


def _raises_on_1(group: dist.ProcessGroup, device: torch.device) -> str:
    if dist.get_rank(group) == 1:
        raise ValueError("rule broken\nand more")
    dist.barrier(group)
    return "never reached"


def _dies_on_1(group: dist.ProcessGroup, device: torch.device) -> str:
    if dist.get_rank(group) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group)
    return "never reached"


def _sleeps_on_1(group: dist.ProcessGroup, device: torch.device) -> str:
    if dist.get_rank(group) == 1:
        time.sleep(600)
    return "there"


def _with_wrong_bytes(group: dist.ProcessGroup, device: torch.device) -> str:
    right = channels._message
    channels._message = lambda source, target, num: right(source, target, num) + (num == 65_552 and source == 1)  # type: ignore[assignment]
    if dist.get_rank(group) == 0:
        channels._message = right
    return channels.point_to_point(group, device)


def _unmasked(group: dist.ProcessGroup, device: torch.device) -> str:
    attention = channels.attention

    def wrong(*args, mask, group):
        from longspan.attention import masks

        return attention(*args, mask=masks.full(mask.num_tokens), group=group, layout="contiguous")

    channels.attention = wrong
    return channels.split_attention(group, device)


def outcomes(*checks, timeout_s: float = 90.0):
    named = [(check.__name__, check) for check in checks]
    return run_checks(named, Ranks(devices=(CPU, CPU), timeout_s=timeout_s))


def test_checks_run_in_order() -> None:
    joined, one, two = outcomes(_says, _says)
    assert (joined.name, joined.status) == (JOIN, "ok") and joined.text.startswith("2 processes")
    assert one == two and (one.name, one.status, one.text) == ("_says", "ok", "2 on cpu")


@pytest.mark.parametrize(
    ("bad", "says"), [(_raises_on_1, "rank 1: rule broken"), (_dies_on_1, "rank 1: died of SIGKILL")]
)
def test_the_rank_that_failed_is_named_and_the_rest_is_not_reached(bad, says: str) -> None:
    began = time.monotonic()
    _, first, failed, after = outcomes(_says, bad, _says)
    assert first.status == "ok"
    assert (failed.name, failed.status) == (bad.__name__, "failed") and says in failed.text
    assert (after.status, after.text) == ("not reached", f"{bad.__name__!r} failed")
    assert time.monotonic() - began < 60  # and not until the time is up


def _late_on_0(file: str, group: dist.ProcessGroup, device: torch.device) -> str:
    if dist.get_rank(group) == 0:
        time.sleep(0.5)
        Path(file).touch()
    return "there"


def _finds(file: str, group: dist.ProcessGroup, device: torch.device) -> str:
    if not Path(file).exists():
        raise ValueError("began before the other rank had ended the check before")
    return "there"


def test_a_rank_goes_on_once_all_have_answered(tmp_path: Path) -> None:
    file = str(tmp_path / "done")
    found = run_checks(
        [("late", partial(_late_on_0, file)), ("next", partial(_finds, file))], Ranks(devices=(CPU, CPU))
    )
    assert [outcome.status for outcome in found] == ["ok"] * 3, found


def test_a_silent_rank_is_late() -> None:
    _, failed = outcomes(_sleeps_on_1, timeout_s=LATE_S)
    assert (failed.status, failed.text) == ("failed", f"no answer within {LATE_S:g} s from rank 1")


def _leaves_its_number_and_sleeps(folder: str, group: dist.ProcessGroup, device: torch.device) -> str:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
    return "never reached"


def test_ranks_are_gone_afterwards(tmp_path: Path) -> None:
    check = partial(_leaves_its_number_and_sleeps, str(tmp_path))
    _, failed = run_checks([("sleep", check)], Ranks(devices=(CPU, CPU), timeout_s=LATE_S))
    assert failed.status == "failed" and "rank 0, 1" in failed.text
    numbers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(numbers) == 2 and not any(map(lives, numbers))


def test_every_collective_of_gloo_on_three_ranks() -> None:
    checks = [channels.all_gather, channels.reduce_scatter, channels.all_reduce]
    found = run_checks([(check.__name__, check) for check in checks], Ranks(devices=(CPU,) * 3))
    assert [outcome.status for outcome in found] == ["ok"] * 4, found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_attention_over_ranks(world: int) -> None:
    _, found = run_checks([("attention", channels.split_attention)], Ranks(devices=(CPU,) * world))
    assert found.status == "ok", found


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(_with_wrong_bytes, "65552 bytes from rank 1: 65552 of 65552"), (_unmasked, "times the error allowed")],
)
def test_a_wrong_channel_is_seen(wrong, says: str) -> None:
    failed = outcomes(wrong)[-1]
    assert failed.status == "failed" and says in failed.text, failed


def test_what_cannot_be_started_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        Ranks(devices=())
    with pytest.raises(ValueError, match="need time, got timeout_s=0"):
        Ranks(devices=(CPU,), timeout_s=0)


def test_checks_may_be_partial() -> None:
    (_, found) = run_checks([("p", partial(_says))], Ranks(devices=(CPU,)))
    assert found.text == "1 on cpu"
