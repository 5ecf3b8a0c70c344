"""A real run under signals and on a full disk: one clear line, no process left, and resuming works."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.longspan_cli import END_S, Job, forked, job, losses, records, train

# With data workers: they are processes too, and must not outlive their rank.
LONG = ("--batch.steps", "100000", "--plan.shard", "zero3", "--data-workers", "1", "--ranks", "2")


def resumes(running: Job, steps: int, world: int = 2) -> None:
    """The run goes on where its newest checkpoint stands, up to some more steps, and ends well."""
    at = max(int(path.name.removeprefix("step_")) for path in (running.out / "checkpoints").glob("step_*[0-9]"))
    argv = train(running.out, "--resume", "latest", "--batch.steps", str(at + steps), "--plan.shard", "zero3")
    forked(*argv, world=world).good()
    assert list(losses(running.out)) == list(range(1, at + steps + 1))
    assert (running.out / "report.html").is_file()


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG)) as running:
        running.wait_for(4)
        running.process.send_signal(signal.SIGINT)
        code, out, err = running.end()
    assert code == 130
    assert err.splitlines() == ["longspan: saving, then leaving"]
    last = max(losses(tmp_path / "run"))
    assert f"interrupted at step {last}; checkpoint step_{last:06d} saved; go on with --resume latest" in out
    assert records(tmp_path / "run", "event")[-1]["message"] == "interrupted"
    assert not (tmp_path / "run" / "model").exists()
    resumes(running, 2)


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG, "--save-every", "3")) as running:
        running.wait_for(7)
        os.kill(running.rank(1), signal.SIGKILL)
        result = running.end()
    line = result.refusal(128 + signal.SIGKILL)
    assert line.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert line.endswith("checkpoints are kept: go on with --resume latest")
    resumes(running, 2, world=1)


@pytest.mark.slow
def test_a_rank_killed_before_the_first_save_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG)) as running:
        running.wait_for(2)
        os.kill(running.rank(1), signal.SIGKILL)
        line = running.end().refusal(128 + signal.SIGKILL)
    assert "--resume" not in line and "checkpoints" not in line


@pytest.mark.slow
def test_a_data_worker_that_dies_costs_no_step(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG)) as running:
        running.wait_for(3)
        parent = psutil.Process(running.rank(1))
        # The forkserver is rank 1's child, and the worker the forkserver's.
        (worker,) = (child for child in parent.children(recursive=True) if child.ppid() != parent.pid)
        worker.kill()
        line = running.end().refusal(1)
    last = max(losses(tmp_path / "run"))
    said = "rank 1: the data worker died (killed by SIGKILL): resume from the last checkpoint"
    assert line == f"{said} (checkpoint step_{last:06d} saved); checkpoints are kept: go on with --resume latest"
    assert records(tmp_path / "run", "event")[-1]["message"] == "a data worker died"
    resumes(running, 2)


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG, "--save-every", "3", "--timeout-s", "5")) as running:
        running.wait_for(7)  # the save of step 6 has begun: that of step 3 has ended
        os.kill(running.rank(1), signal.SIGSTOP)
        line = running.end().refusal(1)
    assert line.startswith("rank 1 has not answered for ") and "(stopped or hung) at step " in line
    resumes(running, 2)


@pytest.mark.slow
def test_ctrl_c_on_one_rank(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG[:-2])) as running:
        running.wait_for(4)
        running.process.send_signal(signal.SIGINT)
        code, out, err = running.end()
    assert code == 130 and err.splitlines() == ["longspan: saving, then leaving"] and "interrupted at step" in out
    resumes(running, 2, world=1)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_orphans(tmp_path: Path) -> None:
    with job(tmp_path / "run", *train(tmp_path / "run", *LONG, "--save-every", "3")) as running:
        running.wait_for(4)
        running.process.kill()
        running.process.communicate(timeout=END_S)
        running.leave_nothing()
    resumes(running, 2)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run folder on a file system of so many KiB."""
    folder = tmp_path / "run"
    folder.mkdir()
    if os.geteuid() != 0 or resource.getpagesize() != 4096:
        pytest.skip("mounts a small tmpfs, which root may, with room counted in pages of 4 KiB")
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounts a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", [800], indirect=True)
def test_a_checkpoint_that_does_not_fit_is_a_warning(small_disk: Path) -> None:
    result = forked(*train(small_disk, "--save-every", "2", "--keep", "9"))
    assert result.code == 0, result
    warnings = result.err.splitlines()
    assert [w.split(":")[0] for w in warnings] == [f"checkpoint of step {step} was not saved" for step in (4, 6)]
    assert all("training goes on, the last good checkpoint is step_000002" in warning for warning in warnings)
    assert sorted(losses(small_disk)) == [1, 2, 3, 4, 5, 6] and (small_disk / "model").is_dir()
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("small_disk", [44], indirect=True)
def test_a_disk_with_no_room_at_all(small_disk: Path) -> None:
    result = forked(*train(small_disk, "--batch.steps", "80"))
    assert result.code == 1 and "Traceback" not in result.err, result
    *warnings, last = result.err.splitlines()
    assert any(w.startswith("metrics of step ") and w.endswith("training goes on") for w in warnings)
    assert "checkpoint of step 80 was not saved: " in result.err
    assert last.startswith("longspan: error: the trained model could not be written to ")
    assert 0 < len(losses(small_disk)) < 80
