"""What ``auto`` chooses by: profiles saved on this machine, and, where ranks have different ones, rank 0's."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.context import SequenceContext, attention, run
from longspan.context import choose as choosing
from longspan.context.attend import where_of
from longspan.context.choose import choose_method, default_layout, here
from longspan.hardware.profile import DeviceProfile, KernelProfile, make_profile
from longspan.hardware.saved import profile_path, save_profile
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MASK, HEADS, KV_HEADS, DIM = masks.causal(64), 4, 2, 8
FREE = KernelProfile(efficiency=1e6, call_s=0)
# Where blocks are dear one wants few of them; where they are free, messages that overlap.
PROFILES = {
    "dear": dataclasses.replace(make_profile("cpu"), name="dear", block_s=1.0),
    "free": dataclasses.replace(make_profile("cpu"), name="free", memory_bytes_per_s=1e15, forward=FREE, backward=FREE),
}


def save(folder: Path, profile: DeviceProfile) -> None:
    """As this process's saved profile of the CPU."""
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    save_profile(profile, profile_path(CPU))


def chosen_alone(name: str) -> str:
    where = dataclasses.replace(here(2, CPU, dtype=torch.float32, head_dim=DIM), device=PROFILES[name])
    return choose_method(MASK, default_layout(MASK, 2), HEADS, KV_HEADS, where).chosen.method


def tensors(batch: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(batch, 32, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))


def methods(rank: int, world: int, names: list[str], folder: str) -> tuple[list[str], int]:
    """The methods that attention, a second batch size and a context take, and how often ranks were told where."""
    save(Path(folder, str(rank)), PROFILES[names[rank]])
    calls, broadcast = 0, dist.broadcast_object_list

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return broadcast(*args, **options)

    dist.broadcast_object_list = counted
    for batch in (1, 2):
        attention(*tensors(batch), mask=MASK)
    found = [bound.built.method for bound in run._TABLE.values()]
    context = SequenceContext(MASK)
    context.attend(*tensors(), layer=0)
    assert context.where is not None and context.where.device.name == names[0]
    return [*found, run.bound(context.handle(HEADS, KV_HEADS, None, None, None)).built.method], calls


def test_profiles_differ_in_what_they_choose() -> None:
    assert chosen_alone("dear") != chosen_alone("free")


@pytest.mark.parametrize("names", [["dear", "free"], ["free", "dear"]])
def test_all_ranks_take_the_method_of_rank_0(names: list[str], tmp_path) -> None:
    for found, calls in run_ranks(methods, 2, names, str(tmp_path)):
        assert found == [chosen_alone(names[0])] * 3
        assert calls == 1


def trouble(rank: int, world: int, how: str, folder: str) -> str:
    """The refusal that a rank meets; afterwards all can go on."""
    save(Path(folder, str(rank)), PROFILES["free"])
    if how == "broken" and rank == 0:
        profile_path(CPU).write_text("{}")
    message = ""
    try:
        attention(*tensors(), mask=MASK, method="ring" if how == "method" and rank == 1 else "auto")
    except ValueError as error:
        message = str(error)
    save(Path(folder, str(rank)), PROFILES["free"])
    attention(*tensors(), mask=MASK)
    return message


@pytest.mark.parametrize(
    ("how", "words"),
    [("method", "all ranks must use one mask, layout, schedule"), ("broken", "no device profile can be read from")],
)
def test_what_is_wrong_on_one_rank_is_refused_on_all(how: str, words: str, tmp_path) -> None:
    for message in run_ranks(trouble, 2, how, str(tmp_path), timeout_s=20):
        assert message.startswith(words)


def test_alone_it_is_this_machine(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    choosing._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=choosing.__name__)
    found = []
    for _ in range(2):
        found.append(where_of(None, CPU, dtype=torch.bfloat16, head_dim=DIM, batch=3))
    save_profile(PROFILES["dear"], profile_path(CPU))
    for _ in range(2):
        found.append(where_of(None, CPU, dtype=torch.float32, head_dim=DIM))
    assert [where.device for where in found] == [make_profile("cpu")] * 2 + [PROFILES["dear"]] * 2
    sizes = found[0].sizes
    assert (sizes.batch, sizes.head_dim, sizes.inputs, sizes.sums) == (3, DIM, 2, 4)
    assert [record.message.split(" take ")[1].partition(" as ")[2] for record in caplog.records] == [
        "the preset 'cpu'",
        f"measured in {profile_path(CPU)}",
    ]
