"""`longspan train --profile`: real traces of real runs, and what is said where none can be taken."""

from __future__ import annotations

import gzip
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.train.config import BatchConfig, TrainConfig
from longspan.train.profiling import StepProfile, profiled_steps, read_ranges, span
from tests.longspan_cli import forked, records, train

STEP_PARTS = {"data", "forward", "backward", "gradient norm", "optimizer", "agreement"}
CPU = torch.device("cpu")


def trace(file: Path) -> list[dict[str, Any]]:
    """The named ranges of a trace, in order of time."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation" and event.get("ph") == "X"]
    return sorted(found, key=lambda event: event["ts"])


def messages(out: Path) -> list[str]:
    return [record["message"] for record in records(out, "event") if "profile" in record["message"]]


def test_two_ranks_write_a_trace_each(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = forked(*train(out, "--profile", "--save-every", "4"), world=2).good().out
    folder = out / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank_0000{rank}.{kind}" for rank in range(2) for kind in ("json.gz", "ranges.json", "txt")
    ]
    assert messages(out) == [f"steps 3 to 5 were profiled: traces for ui.perfetto.dev in {folder}"]
    assert messages(out)[0] in said
    for rank in range(2):
        found = trace(folder / f"rank_0000{rank}.json.gz")
        steps = [event for event in found if event["name"].startswith("step ")]
        assert [event["name"] for event in steps] == ["step 3", "step 4", "step 5"]
        for step in steps:
            end = step["ts"] + step["dur"]
            inside = [event["name"] for event in found if step["ts"] <= event["ts"] and event["ts"] < end]
            own = [name for name in inside if name in STEP_PARTS | {"checkpoint"}]
            assert set(own) == STEP_PARTS | ({"checkpoint"} if step["name"] == "step 4" else set())
            order = [name for name in own if name in ("forward", "backward", "optimizer")]
            assert order == ["forward", "backward", "optimizer"]
        table = (folder / f"rank_0000{rank}.txt").read_text()
        assert "steps 3 to 5" in table and "longspan::attention" in table and table.count("\n") < 45
    rows = read_ranges(folder)
    assert {(row["rank"], row["step"]) for row in rows} == {(rank, step) for rank in range(2) for step in (3, 4, 5)}
    for step in (row for row in rows if row["name"] == "step"):
        parts = [row for row in rows if (row["rank"], row["step"]) == (step["rank"], step["step"]) and row is not step]
        assert 0 < sum(row["duration_ms"] for row in parts) <= step["duration_ms"]
    (folder / "rank_00001.ranges.json").write_text("{")
    assert {row["rank"] for row in read_ranges(folder)} == {0}


def test_a_pipeline_has_the_ranges_too_and_a_first_step_needs_no_warm_up(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--model.layers", "2", "--plan.pipeline", "2", "--batch.steps", "2", "--profile", "1:1")
    forked(*train(out, *options), world=2).good()
    for rank in range(2):
        names = [event["name"] for event in trace(out / "profile" / f"rank_0000{rank}.json.gz")]
        assert names.count("forward") == names.count("backward") == 4, "a range for each of 4 micro-batches"


def test_runs_that_cannot_take_the_profile_say_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = forked(*train(out, "--batch.steps", "4", "--profile")).refusal()
    assert "steps 3 to 5 are to be profiled, got a run of 4 steps; say --profile 1:4, or raise --batch.steps" in short
    forked(*train(out, "--save-every", "3")).good()
    assert not (out / "profile").exists()  # not asked for
    shutil.rmtree(out / "checkpoints" / "step_000006")
    said = forked(*train(out, "--resume", "latest", "--profile")).good().out
    late = (
        "no profile: steps 3 to 5 are to be profiled, but this session goes on after step 3; --profile 6:3 would take "
        "later ones"
    )
    assert messages(out) == [late] and late in said
    assert not (out / "profile").exists()
    stopped = tmp_path / "stopped"
    forked(*train(stopped, "--profile", "5:2", "--limit-s", "1e-9")).good()
    assert messages(stopped) == ["no profile: the run ended before step 5"]
    cut = tmp_path / "cut"
    forked(*train(cut, "--profile", "1:4", "--limit-s", "1e-9")).good()
    assert messages(cut) == [
        f"step 1 was profiled: traces for ui.perfetto.dev in {cut / 'profile'}; the run ended before step 4"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", "FIRST:COUNT, got '3'"),
        ("a:b", "FIRST:COUNT"),
        ("3:-1", "FIRST:COUNT"),
        ("0:1", "first of which is 1 or later"),
        ("3:11", "1 to 10 steps"),
        ("3:0", "1 to 10 steps"),
    ],
)
def test_steps_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(profile=text)


def test_which_steps() -> None:
    assert profiled_steps("auto") == range(3, 6) and profiled_steps("7:1") == range(7, 8)
    assert TrainConfig().profiled is None
    with pytest.raises(ValueError, match="a run of 12 steps"):
        TrainConfig(profile="10:4", batch=BatchConfig(steps=12))


def test_nothing_is_done_while_no_profiler_is_on(tmp_path: Path) -> None:
    assert isinstance(span("forward"), nullcontext)
    profile = StepProfile(None, tmp_path / "profile", 0, CPU, done=0)
    for step in range(1, 4):
        profile.begin(step)
        assert isinstance(span("forward"), nullcontext) and profile.end() == ""
    assert profile.missed() == profile.finish() == ""
    profile.close()
    assert not list(tmp_path.iterdir())


def test_a_jump_over_the_first_step_takes_the_next_ones(tmp_path: Path) -> None:
    profile = StepProfile(range(3, 5), tmp_path, 0, CPU, done=0)
    said = []
    for step in (1, 7, 8, 9):
        profile.begin(step)
        with span("forward"):
            torch.ones(2, 2).mm(torch.ones(2, 2))
        said.append(profile.end())
    assert [bool(words) for words in said] == [False, False, True, False]
    assert {row["step"] for row in read_ranges(tmp_path)} == {7, 8}
    assert said[2].startswith("steps 7 to 8 were profiled")
    apart = StepProfile(range(1, 3), tmp_path, 0, CPU, done=0)
    for step in (1, 9):
        apart.begin(step)
        words = apart.end()
    assert words.startswith("steps 1, 9 were profiled")


def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("not a folder")
    profile = StepProfile(range(1, 2), tmp_path / "profile", 0, CPU, done=0)
    profile.begin(1)
    assert profile.end() == "the profile could not be written: File exists; training goes on"
