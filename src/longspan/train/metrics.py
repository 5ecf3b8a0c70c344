"""Metrics of a run as JSON lines: one record a line, flushed line by line, single-valued across resumes.

Each line is strict JSON with ``kind`` ("step", "eval" or "event"), ``step`` and ``time_s`` (seconds of training since
the first start; it goes on counting from the last kept record after a resume, so that it never runs backwards).

*Resuming at step k* means that the checkpoint holds the state after step k. Records of later steps belong to a past
that the run has left: they are moved to ``<path>.superseded`` (nothing is lost) and the metrics file keeps steps
0..k, so that one step has one loss. The rewrite goes through a temporary file and a rename: a kill leaves the old
file or the new one.

*Not finite.* JSON has no NaN. A number that is not finite is written as null and named in ``non_finite``;
`read_metrics` puts it back.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Kind = Literal["step", "eval", "event"]
Record = dict[str, Any]
_KINDS = ("step", "eval", "event")
_RESERVED = ("kind", "step", "time_s", "non_finite")


class MetricsWriter:
    """Appends records to one JSONL file; use it on one rank only, as a context manager or with `close`.

    Args:
        path: the file; its folder is made.
        resume_step: None for a new run (a file that already holds records is refused); k after loading the checkpoint
            of step k (later records are moved aside, see the module's docstring); 0 to start over in the same file.
        clock: seconds that only grow; for tests.

    Raises:
        ValueError: the file holds records and ``resume_step`` is None, or it is damaged beyond one torn last line.
    """

    def __init__(
        self, path: str | Path, *, resume_step: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        kept: list[Record] = []
        if resume_step is not None:
            if resume_step < 0:
                raise ValueError(f"resume_step must be 0 or more, got {resume_step}; use 0 to start over")
            kept = _keep_until(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size > 0:
            raise ValueError(
                f"a new run must not write into old metrics, but {self.path} holds {self.path.stat().st_size} bytes; "
                "choose another folder, or resume"
            )
        self._last_step = max((r["step"] for r in kept if r["kind"] == "step"), default=-1)
        self._time_base = max((r["time_s"] for r in kept), default=0.0)
        self._start = clock()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - held for the whole run; unbuffered: a line is on the file when write returns
        self._end = self._file.seek(0, os.SEEK_END)

    def step(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_s: float,
        memory_bytes: float,
        learning_rate: float,
        gradient_norm: float,
        sequence_length: int,
        **extra: Any,
    ) -> Record:
        """Records one optimiser step: loss in nats a token, memory as the peak of the fullest rank.

        Raises:
            ValueError: the step is not later than the last one (the curve must stay single-valued).
        """
        if step <= self._last_step:
            raise ValueError(
                f"steps must increase, got step {step} after {self._last_step}; "
                f"open the writer with resume_step={step - 1}"
            )
        record = self._write(
            "step",
            step,
            loss=loss,
            tokens_per_s=tokens_per_s,
            memory_bytes=memory_bytes,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            sequence_length=sequence_length,
            **extra,
        )
        self._last_step = step
        return record

    def eval(self, step: int, *, loss: float, sequence_length: int, **extra: Any) -> Record:
        """Records a held-out evaluation after ``step``: loss in nats a token at one sequence length."""
        return self._write("eval", step, loss=loss, sequence_length=sequence_length, **extra)

    def event(self, step: int, message: str, **extra: Any) -> Record:
        """Records something that happened after ``step``: a save, a resume, a warning."""
        return self._write("event", step, message=message, **extra)

    def _write(self, kind: Kind, step: int, /, **values: Any) -> Record:
        if self._file.closed:
            raise ValueError(
                f"metrics go to an open writer, but {self.path} is closed; open a new one with resume_step"
            )
        if reserved := [name for name in _RESERVED if name in values]:
            raise ValueError(f"record fields must not be named {reserved[0]!r}: the writer sets it; rename the field")
        time_s = round(self._time_base + self._clock() - self._start, 6)
        record: Record = {"kind": kind, "step": step, "time_s": time_s, **values}
        line = (_encode(record) + "\n").encode()
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            # A full disk leaves half a line; cut it off, or the next good record would be glued to it.
            self._file.truncate(self._end)
            raise
        self._end += len(line)
        return record

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path, kind: Kind | None = None) -> list[Record]:
    """All records of a metrics file in the order written; of one ``kind`` if given.

    A last line without a line end that is no JSON is the mark of a killed writer and is left out. Other damage is
    refused.

    Raises:
        ValueError: an unknown kind, or a line (named) that is not a record.
        FileNotFoundError: there is no such file.
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    lines = Path(path).read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last line end: empty in a whole file
    records = [_decode(line, path, number) for number, line in enumerate(lines, 1)]
    if torn:
        try:
            json.loads(torn)
        except ValueError:
            pass  # half a record: the writer was killed inside the write
        else:
            records.append(_decode(torn, path, len(lines) + 1))
    return records if kind is None else [record for record in records if record["kind"] == kind]


def _keep_until(path: Path, step: int) -> list[Record]:
    """Moves the records after ``step`` to ``<path>.superseded``; returns the kept ones."""
    if not path.exists():
        return []
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    dropped = [record for record in records if record["step"] > step]
    if dropped:
        with open(f"{path}.superseded", "a", encoding="utf-8") as file:
            file.writelines(_encode(record) + "\n" for record in dropped)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(_encode(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _encode(record: Record) -> str:
    odd = {name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    if odd:
        record = {**record, **dict.fromkeys(odd), "non_finite": odd}
    try:
        return json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a metrics record must be plain JSON data with finite numbers in lists ({error}), got {record!r}; "
            "convert tensors with .item()"
        ) from error


def _decode(line: bytes, path: str | Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"a metrics line must be JSON, but {path} line {number} is not: {line[:60]!r}; remove it"
        ) from error
    good = isinstance(record, dict) and record.get("kind") in _KINDS and type(record.get("step")) is int
    if not good or not isinstance(record.get("time_s"), int | float):
        raise ValueError(
            f"a metrics line must hold kind, step and time_s, but {path} line {number} is {line[:60]!r}; remove it"
        )
    for name, value in record.pop("non_finite", {}).items():
        record[name] = float(value)
    return record
