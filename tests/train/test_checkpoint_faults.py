"""Checkpoints when a save is killed, the disk is full or a peer is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longspan.train import checkpoint as module
from longspan.train.checkpoint import CheckpointStore
from longspan.train.manifest import SaveError, read_manifest
from tests.ranks import run_ranks
from tests.train.stores import Flat, assert_same, flatten, saved, train
from tests.train.toy import build

# ---------------------------------------------------------------- kills and full disks


def test_leftovers_of_killed_saves_are_removed_at_start_and_an_unfinished_replacement_is_undone(tmp_path: Path) -> None:
    store, _ = saved(tmp_path, [1, 2, 3])
    shutil.copytree(store.path(3), tmp_path / "step_000004.partial")
    store.path(3).rename(tmp_path / "step_000003.old")  # killed between the two renames
    shutil.copytree(store.path(1), tmp_path / "step_000001.old")  # killed after them
    (tmp_path / "notes.partial").mkdir()  # not ours
    assert CheckpointStore(tmp_path, read_only=True).list() == [1, 2]
    again = CheckpointStore(tmp_path)
    assert again.list() == [1, 2, 3]
    for step in again.list():
        again.verify(again.path(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.partial",
        "step_000001",
        "step_000002",
        "step_000003",
    ]


SAVE_UNTIL_KILLED = """
import sys, torch
from torch import nn
from longspan.train.checkpoint import CheckpointStore
torch.set_num_threads(1)
model = nn.Linear(300, 300)
store = CheckpointStore(sys.argv[1], keep=2)
for step in range(100000):
    nn.init.constant_(model.weight, step)
    store.save_async(step, model, None, {"step": step})
    print(step, flush=True)
"""


def stop_inside_a_save(process: subprocess.Popen[str], directory: Path, delay_s: float) -> None:
    """Stops the process so long after it was last seen, and again until that was in the middle of a save."""
    while True:
        time.sleep(delay_s)
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        if any(path.suffix == ".partial" for path in directory.iterdir()):
            return
        process.send_signal(signal.SIGCONT)


def test_kill_at_any_moment_of_a_save_leaves_only_checkpoints_that_are_whole(tmp_path: Path) -> None:
    for delay_s in (0.004, 0.011, 0.017):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline()
        stop_inside_a_save(process, tmp_path, delay_s)
        process.kill()
        process.wait()
        process.stdout.close()
        store = CheckpointStore(tmp_path, keep=2)
        assert store.list() and not any(path.suffix for path in tmp_path.iterdir())
        for step in store.list():
            model = nn.Linear(300, 300)
            assert store.load(step, model) == {"step": step}
            assert (model.weight == step).all()


def lose_the_disk(rank: int, world: int, directory: str) -> tuple[list[bool], list[int], list[str], Flat]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module.log.addHandler(handler)
    module.log.propagate = False
    model, optimizer = build(True, world, dim=41)
    store = CheckpointStore(directory)
    landed = []
    for step, full in enumerate((False, True, True, False)):
        train(model, optimizer, step, step + 1)
        if rank == 0:
            ballast = Path(directory) / "ballast"
            ballast.unlink(missing_ok=True)
            if full:
                with ballast.open("wb") as file:
                    free = shutil.disk_usage(directory).free
                    file.write(b"x" * (free - 4096 * step))  # the second time, a little is left
        torch.distributed.barrier()
        store.save_async(step, model, optimizer, {"step": step})
        landed.append(store.wait())
        torch.distributed.barrier()
    return landed, store.list(), records, flatten(model, optimizer)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_disk_full_while_saving(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mounts here: {mounted.stderr.decode().strip()}")
    try:
        results = run_ranks(lose_the_disk, 2, str(tmp_path))
        for rank, (landed, steps, records, _) in enumerate(results):
            assert landed == [True, False, False, True] and steps == [0, 3]
            assert len(records) == (2 if rank == 0 else 0)
            for step, text in zip((1, 2), records, strict=False):
                assert f"step {step} was not saved" in text and "No space left" in text and "step_000000" in text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000", "step_000003"]
        model, optimizer = build(False, 1, dim=41)
        CheckpointStore(tmp_path).load(None, model, optimizer)
        assert_same(flatten(model, optimizer), results[0][3])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("moment", ["tensors", "digest", "manifest", "rename"])
def test_disk_full_at_each_moment(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    store, states = saved(tmp_path, [1])
    model, optimizer = build(False, 1)
    train(model, optimizer, 0, 1)
    with monkeypatch.context() as patch:
        if moment == "tensors":
            patch.setattr(module.Writer, "write_data", full)
        elif moment == "rename":
            patch.setattr(Path, "rename", full)
        else:
            patch.setattr(module, {"digest": "digest_file", "manifest": "write_manifest"}[moment], full)
        store.save_async(2, model, optimizer, {})
        assert not store.wait() and not store.wait()
    ours = [record for record in caplog.records if record.name == module.log.name]
    assert [record.levelname for record in ours] == ["WARNING"]
    assert "No space left on device" in ours[0].getMessage() and "step_000001" in ours[0].getMessage()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    store.load(None, model, optimizer)
    assert_same(flatten(model, optimizer), states[1])
    store.save_async(2, model, optimizer, {})
    assert store.wait() and store.list() == [1, 2]


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("a defect")

    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.Writer, "write_data", broken)
        store.save_async(1, nn.Linear(2, 2), None, {})
        with pytest.raises(SaveError, match="a defect"):
            store.wait()
    assert store.list() == []


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    threads = threading.active_count()
    store, _ = saved(tmp_path, [5])
    manifest = read_manifest(store.path(5))
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in store.path(5).iterdir()}
    assert manifest["step"] == 5 and json.loads((store.path(5) / "manifest.json").read_text())["digest"]
    assert threading.active_count() <= threads


def lose_a_peer(rank: int, world: int, directory: str) -> str:
    store = CheckpointStore(directory, timeout_s=20)
    model, optimizer = build(False, world)
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    store.save_async(1, model, optimizer, {})  # its writer waits for the rank that goes away
    try:
        store.wait()
    except SaveError as error:
        Path(directory, "said").write_text(str(error))
    return "done"


def test_a_lost_peer_ends_the_save_and_leaves_nothing_that_loads(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_ranks(lose_a_peer, 2, str(tmp_path))
    for _ in range(50):
        if (tmp_path / "said").exists():
            break
        time.sleep(0.1)
    assert CheckpointStore(tmp_path).list() == []
