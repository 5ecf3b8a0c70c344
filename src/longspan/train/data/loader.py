"""The loader: batches drawn and prepared in a worker process, ahead of the training step.

`prepare` runs in the worker for every batch: attention schedules for a batch's mask are built there, once for all
layers, while the previous step computes. One worker is enough and keeps the order. It is started through forkserver,
because forking a process that has threads, CUDA or process groups is not safe, and its results come through a pipe,
which needs no shared memory (small in many containers) and tells at once when either side is gone.

The worker holds nothing worth saving, so `close` kills it. It ignores Ctrl-C and SIGTERM, which reach a whole process
group (the training process decides what they mean and may want batches until it has saved), and leaves by itself as
soon as the training process is gone, even killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch

from longspan.train.data.batches import Batch, BatchPlan, plan_batches
from longspan.train.data.stream import TokenStream

Prepare = Callable[[Batch], Any]


class DataWorkerError(RuntimeError):
    """The worker process is gone, killed for its memory perhaps."""


class _Refused(NamedTuple):
    """A ValueError of the worker."""

    message: str


class _Failed(NamedTuple):
    """Any other error of the worker, with its traceback."""

    report: str


class _End(NamedTuple):
    """The plan has no more steps."""


class BatchLoader:
    """Iterates over (batch, prepared) from `step` to the end of the plan, once.

    Args:
        stream, plan: what is drawn.
        step: first step drawn.
        position: position in the stream of that step; None: where the plan puts it.
        data_rank, data_size: this rank among those that draw different rows (ranks that share a sequence, by context
            parallelism, have the same data_rank).
        prepare: called with each batch in the worker; its result comes with the batch. It and its result must pickle.
        num_workers: 1 for a worker process, 0 to draw in this one.
        prefetch: batches that the worker has ready.

    Attribute ``waited_s``: seconds that the caller has waited for batches, in all.

    Raises ValueError where the plan does not fit the ranks, or `prepare` does not pickle; while iterating, the
    ValueError that `prepare` raises, DataWorkerError where the worker dies, RuntimeError with its traceback for another
    error in the worker. An error closes the loader, and so does Ctrl-C while it waits: a trainer that wants batches
    after it handles the signal.
    """

    def __init__(
        self,
        stream: TokenStream,
        plan: BatchPlan,
        *,
        step: int = 0,
        position: int | None = None,
        data_rank: int = 0,
        data_size: int = 1,
        prepare: Prepare | None = None,
        num_workers: int = 1,
        prefetch: int = 2,
    ) -> None:
        if num_workers not in (0, 1):
            raise ValueError(f"num_workers must be 0 or 1, got {num_workers}: one worker keeps the order of batches")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}: the worker has that many batches ready")
        if not 0 <= step <= plan.num_steps:
            raise ValueError(f"step must be in [0, {plan.num_steps}], got {step}: the plan has {plan.num_steps} steps")
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank must be in [0, {data_size}), got {data_rank}: check the plan")
        plan.check(data_size)
        job = _Job(stream, plan, step, position, data_rank, data_size, prepare)
        self._items = _in_process(job) if num_workers == 0 else _Worker(job, prefetch)
        self._closed = False
        self.waited_s = 0.0

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> tuple[Batch, Any]:
        if self._closed:
            raise StopIteration
        began_s = time.perf_counter()
        try:
            return next(self._items)
        except BaseException:
            # Also for Ctrl-C: half a message may have been read, and what follows it is no message.
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - began_s

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker and waits for it; may be called again."""
        self._closed = True
        if isinstance(self._items, _Worker):
            self._items.close()


class _Job(NamedTuple):
    """What a worker needs to know."""

    stream: TokenStream
    plan: BatchPlan
    step: int
    position: int | None
    data_rank: int
    data_size: int
    prepare: Prepare | None


def _in_process(job: _Job) -> Iterator[tuple[Batch, Any]]:
    batches = plan_batches(
        job.stream,
        job.plan,
        step=job.step,
        position=job.position,
        data_rank=job.data_rank,
        data_size=job.data_size,
    )
    for batch in batches:
        yield batch, job.prepare(batch) if job.prepare else None


class _Worker:
    """The training process's side of the worker."""

    def __init__(self, job: _Job, prefetch: int) -> None:
        try:
            pickle.dumps(job.prepare)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"prepare must pickle to reach the worker, got {job.prepare!r} ({error}): use a module's function"
            ) from None
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(job, theirs, prefetch), name="longspan data worker", daemon=True
        )
        self._process.start()
        theirs.close()
        # At exit multiprocessing sends SIGTERM to daemons and waits, which would be for ever: this comes before that.
        self._end = Finalize(self, _kill, args=(self._process,), exitpriority=100)

    def __next__(self) -> tuple[Batch, Any]:
        try:
            message = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise DataWorkerError(f"the data worker died ({how}): resume from the last checkpoint") from None
        if isinstance(message, _Refused):
            raise ValueError(message.message)
        if isinstance(message, _Failed):
            raise RuntimeError(f"the data worker failed:\n{message.report}")
        if isinstance(message, _End):
            raise StopIteration
        return message

    def close(self) -> None:
        self._pipe.close()
        self._end()


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _work(job: _Job, pipe: Connection, prefetch: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # A pipe holds little, so sending waits until the trainer asks; meanwhile the next batches are drawn.
    ready: queue.Queue[bytes | None] = queue.Queue(maxsize=prefetch)
    sender = threading.Thread(target=_send, args=(ready, pipe), daemon=True)
    sender.start()
    try:
        for item in _in_process(job):
            ready.put(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        last: _Refused | _Failed | _End = _End()
    except ValueError as error:
        last = _Refused(str(error))
    except Exception:  # whatever `prepare` raises is shown by the training process
        last = _Failed(traceback.format_exc())
    ready.put(pickle.dumps(last))
    ready.put(None)
    sender.join()


def _send(ready: queue.Queue[bytes | None], pipe: Connection) -> None:
    try:
        while (message := ready.get()) is not None:
            pipe.send_bytes(message)
    except OSError:
        # Nobody reads any more.
        os._exit(0)


def _leave_with_parent() -> None:
    # A worker busy in prepare would notice only when it has something to send.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
