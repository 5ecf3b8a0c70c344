from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import tests.ranks  # noqa: F401 (preloads torch into the server that processes are forked from)
from longspan.train.data.batches import Batch, BatchPlan, Stage, plan_batches
from longspan.train.data.loader import BatchLoader, DataWorkerError
from longspan.train.data.stream import TokenStream
from tests.processes import left_after, lives
from tests.train.data.corpora import constant_plan, write_corpus

PLAN = BatchPlan(
    stages=(Stage(steps=3, rows=4, length=5), Stage(steps=2, rows=2, length=11)), packing="documents", micro_rows=1
)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return TokenStream(write_corpus(tmp_path, [7, 3, 11, 19]), 5)


def where_and_what(batch: Batch) -> tuple[int, int]:
    return os.getpid(), int(batch.tokens.sum())


def refuse_second_step(batch: Batch) -> None:
    if batch.step == 1:
        raise ValueError("step 1 does not please")


def break_second_step(batch: Batch) -> float:
    return 1 / (1 - batch.step)


def prepare_slowly(folder: Path, batch: Batch) -> None:
    time.sleep(0.2)
    (folder / f"prepared_{batch.step}").touch()


def make_function(batch: Batch) -> object:
    return lambda: batch


def large(batch: Batch) -> bytes:
    return bytes([batch.step]) * (1 << 20)


def die_second_step(batch: Batch) -> None:
    if batch.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_draws_what_the_plan_says(stream: TokenStream, num_workers: int) -> None:
    options = {"step": 1, "position": 77, "data_rank": 1, "data_size": 2}
    expected = list(plan_batches(stream, PLAN, **options))
    with BatchLoader(stream, PLAN, prepare=where_and_what, num_workers=num_workers, **options) as loader:
        found = list(loader)
    assert len(found) == len(expected) == 6
    for (batch, (pid, total)), wanted in zip(found, expected, strict=True):
        assert torch.equal(batch.tokens, wanted.tokens) and torch.equal(batch.labels, wanted.labels)
        for name in ("lengths", "num_labels", "position", "step", "micro", "num_micro"):
            assert getattr(batch, name) == getattr(wanted, name)
        assert total == int(wanted.tokens.sum())
        assert (pid == os.getpid()) == (num_workers == 0)
    assert num_workers == 0 or not left_after([found[0][1][0]])
    assert list(loader) == []


def test_closing_early_ends_the_worker(stream: TokenStream) -> None:
    loader = BatchLoader(stream, constant_plan(steps=1000, rows=1, length=3), prepare=where_and_what)
    _, (pid, _) = next(loader)
    assert lives(pid)
    loader.close()
    loader.close()
    assert not lives(pid)  # close has waited for it
    assert list(loader) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_prepare(stream: TokenStream, num_workers: int) -> None:
    plan = constant_plan(steps=3, rows=1, length=3)
    loader = BatchLoader(stream, plan, prepare=refuse_second_step, num_workers=num_workers)
    assert next(loader)[0].step == 0
    with pytest.raises(ValueError) as caught:
        next(loader)
    assert str(caught.value) == "step 1 does not please"
    assert list(loader) == []
    with BatchLoader(stream, plan, prepare=break_second_step, num_workers=num_workers) as loader:
        assert next(loader)[1] == 1
        with pytest.raises(RuntimeError if num_workers else ZeroDivisionError, match="division by zero"):
            next(loader)


def test_a_result_that_does_not_pickle(stream: TokenStream) -> None:
    with (
        BatchLoader(stream, constant_plan(steps=3, rows=1, length=3), prepare=make_function) as loader,
        pytest.raises(RuntimeError, match="pickle"),
    ):
        next(loader)


def test_a_killed_worker_is_an_error(stream: TokenStream) -> None:
    plan = constant_plan(steps=3, rows=1, length=3)
    with (
        BatchLoader(stream, plan, prepare=die_second_step) as loader,
        pytest.raises(DataWorkerError, match=r"the data worker died \(killed by SIGKILL\)"),
    ):
        # The first batch may have been sent or not.
        while True:
            next(loader)


def test_results_larger_than_a_pipe(stream: TokenStream) -> None:
    with BatchLoader(stream, constant_plan(steps=5, rows=1, length=3), prepare=large) as loader:
        time.sleep(0.1)
        assert [prepared == bytes([step]) * (1 << 20) for step, (_, prepared) in enumerate(loader)] == [True] * 5


def test_refusals(stream: TokenStream) -> None:
    plan = constant_plan(steps=3, rows=2, length=3)
    for options, message in [
        ({"num_workers": 2}, "num_workers"),
        ({"prefetch": 0}, "prefetch"),
        ({"step": 4}, "step"),
        ({"data_rank": 2, "data_size": 2}, "data_rank"),
        ({"data_size": 3}, "2 rows must give each of 3 data ranks"),
        ({"prepare": lambda batch: None}, "pickle"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchLoader(stream, plan, **options)  # type: ignore[arg-type]
    assert list(BatchLoader(stream, plan, step=3)) == []


TRAINING = """
import signal
import sys
from pathlib import Path
from longspan.train.data.loader import BatchLoader
from longspan.train.data.stream import TokenStream
from tests.train.data.corpora import constant_plan, write_corpus
from tests.train.data.test_loader import where_and_what

if __name__ == "__main__":
    stop = []
    if sys.argv[2] == "flag":
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    stream = TokenStream(write_corpus(Path(sys.argv[1]), [7, 3, 11]))
    loader = BatchLoader(stream, constant_plan(steps=10**9, rows=1, length=3), prepare=where_and_what)
    try:
        for batch, (pid, _) in loader:
            if batch.step == 3:
                print(pid, flush=True)
            if stop:
                break
        # A trainer may want further batches before it leaves. It forgets to close.
        print("left", [next(loader)[0].step - batch.step for _ in range(9)], flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def training(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A training process in a session of its own, and the id of its data worker."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), request.param],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    with process:
        yield process, int(line)
        process.kill()


@pytest.mark.parametrize(
    ("training", "number", "expected"),
    [
        ("flag", signal.SIGTERM, "left [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"),
        ("exception", signal.SIGINT, "interrupted\n"),
    ],
    indirect=["training"],
)
def test_signals_are_for_the_trainer(
    training: tuple[subprocess.Popen[str], int], number: signal.Signals, expected: str
) -> None:
    process, worker = training
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=90)
    assert (out, err, process.returncode) == (expected, "", 0)
    assert not left_after([worker])


@pytest.mark.parametrize("training", ["flag"], indirect=True)
def test_a_killed_trainer_leaves_no_worker(training: tuple[subprocess.Popen[str], int]) -> None:
    process, worker = training
    process.kill()
    assert not left_after([worker])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_preparing_costs_the_caller_nothing_where_a_worker_does_it(
    stream: TokenStream, tmp_path: Path, num_workers: int
) -> None:
    plan = BatchPlan(stages=(Stage(steps=6, rows=1, length=5),), packing="documents")
    with BatchLoader(stream, plan, prepare=partial(prepare_slowly, tmp_path), num_workers=num_workers) as loader:
        next(loader)  # the worker starts
        before_s = loader.waited_s
        for step in range(1, 6):
            # A step takes longer than preparing, on a busy machine too.
            deadline_s = time.monotonic() + 20
            while num_workers and not (tmp_path / f"prepared_{step}").exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)
            next(loader)
        waited_s = loader.waited_s - before_s
    assert waited_s >= 5 * 0.2 if num_workers == 0 else waited_s < 5 * 0.1
