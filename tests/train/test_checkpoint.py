"""Checkpoints: bit-for-bit resume, other ranks and shardings, damage, refusals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longspan.train.checkpoint import CheckpointStore
from longspan.train.manifest import CheckpointError
from tests.ranks import run_ranks
from tests.train.stores import Flat, assert_same, flatten, saved, tensor_file, train
from tests.train.toy import build

# ---------------------------------------------------------------- saving and loading


def test_resume_is_bit_for_bit_and_the_save_is_a_snapshot(tmp_path: Path) -> None:
    straight = train(*build(False, 1), 0, 9)
    model, optimizer = build(False, 1)
    store = CheckpointStore(tmp_path, keep=2)
    losses = train(model, optimizer, 0, 4)
    store.save_async(3, model, optimizer, {"position": 12})
    train(model, optimizer, 4, 6)  # goes on while the save is under way, and must not leak into it
    assert store.wait()
    model, optimizer = build(False, 1)
    train(model, optimizer, 100, 103)  # anything else
    assert store.load(None, model, optimizer) == {"position": 12}
    assert losses + train(model, optimizer, 4, 9) == straight


def save_at(rank: int, world: int, directory: str, shard: bool) -> tuple[Flat, list[float]]:
    model, optimizer = build(shard, world)
    store = CheckpointStore(directory)
    resumed = store.latest()
    first = 0 if resumed is None else 1 + store.load(None, model, optimizer)["step"]
    before = flatten(model, optimizer) if first else {}
    losses = train(model, optimizer, first, first + 3)
    store.save_async(first + 2, model, optimizer, {"step": first + 2})
    after = flatten(model, optimizer)  # a collective of the training group, while the writers talk over theirs
    assert store.wait()
    return {f"before {k}": v for k, v in before.items()} | {f"after {k}": v for k, v in after.items()}, losses


def part(states: Flat, when: str) -> Flat:
    return {k.removeprefix(when + " "): v for k, v in states.items() if k.startswith(when)}


def test_ranks_and_sharding_may_change_at_every_resume(tmp_path: Path) -> None:
    """2 sharded → 3 sharded → 2 replicated → 1 → 3 sharded: what is loaded is what was saved, to the bit."""
    straight = train(*build(False, 1), 0, 15)
    previous: Flat | None = None
    losses: list[float] = []
    for world, shard in ((2, True), (3, True), (2, False), (1, False), (3, True)):
        one = [save_at(0, 1, str(tmp_path), shard)] if world == 1 else None
        results = one or run_ranks(save_at, world, str(tmp_path), shard)
        states = results[0][0]
        for other, _ in results[1:]:
            assert_same(other, states)
        if previous is not None:
            assert_same(part(states, "before"), previous)
        previous = part(states, "after")
        losses += results[0][1]
    assert losses == pytest.approx(straight, rel=1e-5)


def test_keeps_the_last_ones_written(tmp_path: Path) -> None:
    store, _ = saved(tmp_path, [1, 2, 3, 4], keep=2)
    assert store.list() == [3, 4] and store.latest() == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_latest_is_the_one_written_last_also_after_going_back(tmp_path: Path) -> None:
    store, _ = saved(tmp_path, [1, 2, 9])
    model, optimizer = build(False, 1)
    store.load(2, model, optimizer)
    store.save_async(3, model, optimizer, {"branch": 2})
    assert store.wait() and store.list() == [1, 2, 9, 3] and store.meta() == {"branch": 2}
    store.save_async(9, model, optimizer, {"branch": 2})  # the same step again replaces the other branch's
    assert store.wait() and store.list() == [1, 2, 3, 9] and store.meta() == {"branch": 2}
    store.verify(store.path(9))


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_listed(tmp_path: Path) -> None:
    """As for a reader beside a run: an old one goes after its folder was seen and before it was looked into."""

    class Reader(CheckpointStore):
        def _order(self, step: int) -> int:
            shutil.rmtree(self.path(1), ignore_errors=True)
            return super()._order(step)

    saved(tmp_path, [1, 2, 3])
    assert Reader(tmp_path, read_only=True).list() == [2, 3]


def test_before_the_first_step_there_is_no_optimiser_state(tmp_path: Path) -> None:
    model, optimizer = build(False, 1)
    store = CheckpointStore(tmp_path)
    store.save_async(0, model, optimizer, {})
    assert store.wait()
    straight = train(model, optimizer, 0, 3)
    store.load(None, model, optimizer)
    assert not optimizer.state and train(model, optimizer, 0, 3) == straight


def test_tied_frozen_and_unused_parameters_and_buffers(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "unused": nn.Linear(2, 2)}
        )
        model["head"].weight = model["embed"].weight  # pyright: ignore
        model.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        model["frozen"] = nn.Linear(3, 3).requires_grad_(False)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
        loss = model["head"](model["frozen"](model["embed"](torch.arange(5)))).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.seen += 1
        return loss.item()

    model, optimizer = make()
    straight = [step(model, optimizer) for _ in range(4)]
    model, optimizer = make()
    [step(model, optimizer) for _ in range(2)]
    store = CheckpointStore(tmp_path)
    store.save_async(1, model, optimizer, {})
    assert store.wait()
    again, fresh = make()
    store.load(1, again, fresh)
    assert len(fresh.state) == len(optimizer.state) == 1 and again.get_buffer("seen").tolist() == [2, 2, 2]
    assert [step(again, fresh) for _ in range(2)] == straight[2:]


def test_model_alone(tmp_path: Path) -> None:
    _, states = saved(tmp_path, [4])
    model, _ = build(False, 1)
    assert CheckpointStore(tmp_path, read_only=True).load(None, model) == {"step": 4, "position": 68}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, states[4][name])


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"), [(truncate, "is truncated"), (flip, "is damaged"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("which", ["tensors", ".metadata", "manifest.json"])
def test_a_damaged_file_is_refused_by_name_and_the_previous_step_offered(
    tmp_path: Path, damage: Any, words: str, which: str
) -> None:
    store, states = saved(tmp_path, [100, 200, 300])
    path = tensor_file(store, 300) if which == "tensors" else store.path(300) / which
    damage(path)
    model, optimizer = build(False, 1)
    before = flatten(model, optimizer)
    with pytest.raises(CheckpointError) as error:
        store.load(None, model, optimizer)
    text = str(error.value)
    assert "\n" not in text and "step_000300" in text and path.name in text
    assert words in text or which == "manifest.json"
    assert text.endswith("resume with --resume step_000200")
    assert_same(flatten(model, optimizer), before)  # nothing was loaded
    store.load(200, model, optimizer)
    assert_same(flatten(model, optimizer), states[200])
    store.save_async(250, model, optimizer, {})
    assert store.wait() and store.latest() == 250  # the damaged one does not stand in the way for ever


def test_the_offered_step_is_itself_intact(tmp_path: Path) -> None:
    store, _ = saved(tmp_path, [1, 2, 3])
    truncate(tensor_file(store, 2))
    truncate(tensor_file(store, 3))
    with pytest.raises(CheckpointError, match=r"--resume step_000001$"):
        store.load(None, *build(False, 1))
    truncate(tensor_file(store, 1))
    with pytest.raises(CheckpointError, match="no other checkpoint is intact"):
        store.load(None, *build(False, 1))


def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path) -> None:
    store, _ = saved(tmp_path, [1])
    path = store.path(1) / "manifest.json"
    path.write_text(path.read_text().replace('"position": 17', '"position": 18'))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        store.meta()


def save_and_load_damaged(rank: int, world: int, directory: str) -> list[tuple[str, str]]:
    model, optimizer = build(True, world)
    store = CheckpointStore(directory)
    for step in (2, 5):
        train(model, optimizer, step, step + 1)
        store.save_async(step, model, optimizer, {})
        assert store.wait()
    said = []
    for path in sorted(store.path(5).glob("*.distcp")):  # each in the share of another rank
        for damage in (True, False):
            torch.distributed.barrier()
            if rank == 0:
                flip(path)
            torch.distributed.barrier()
            if damage:
                with pytest.raises(CheckpointError) as error:
                    store.load(None, model, optimizer)
                said.append((path.name, str(error.value)))
    store.load(None, model, optimizer)
    return said


def test_every_rank_refuses_and_says_the_same(tmp_path: Path) -> None:
    """The damaged file is in the share of one rank; the others must not go on into the load."""
    results = run_ranks(save_and_load_damaged, 2, str(tmp_path))
    assert results[0] == results[1] and len(results[0]) == 2
    for name, text in results[0]:
        assert name in text and "is damaged" in text and text.endswith("--resume step_000002")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3, bias=False), nn.LayerNorm(3)),
            "architecture: .* shape",
        ),
        (
            lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.LayerNorm(3)),
            "architecture: .* in the model and not",
        ),
        (
            lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False)),
            "architecture: .* in the checkpoint and not",
        ),
        (lambda: build(False, 1)[0].to(torch.bfloat16), "precision: .* torch.float32 in the checkpoint and"),
    ],
)
def test_another_architecture_or_precision_is_refused(tmp_path: Path, other: Any, words: str) -> None:
    store, _ = saved(tmp_path, [1])
    with pytest.raises(CheckpointError, match=words) as error:
        store.load(None, other())
    assert "\n" not in str(error.value)


def test_what_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    model, optimizer = build(False, 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*start without --resume"):
        store.load(None, model)
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot hold checkpoints: .*; choose another directory$"):
        CheckpointStore(tmp_path / "file")
    with pytest.raises(ValueError, match="plain JSON"):
        store.save_async(1, model, optimizer, {"path": tmp_path})
    with pytest.raises(ValueError, match="plain JSON"):
        store.save_async(1, model, optimizer, {"loss": float("nan")})
    with pytest.raises(ValueError, match="read_only"):
        CheckpointStore(tmp_path, read_only=True).save_async(1, model, optimizer, {})
    saved(tmp_path, [7])
    with pytest.raises(CheckpointError, match=r"no checkpoint step_000008 in .* there are step_000007"):
        store.load(8, model)
