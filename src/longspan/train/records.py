"""What a run records of itself: metrics.jsonl always, TensorBoard's event files where they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from longspan.train.metrics import MetricsWriter
from longspan.train.tensorboard import Board

log = logging.getLogger(__name__)


class Records:
    """The records of a run; on ranks other than 0 every call does nothing. A full disk costs a record, not the run."""

    def __init__(self, writer: MetricsWriter | None = None, board: Board | None = None) -> None:
        self._writer, self._board = writer, board

    def step(self, step: int, *, tokens: int, **values: Any) -> None:
        self._write("step", step, tokens=tokens, **values)

    def eval(self, step: int, tokens: int, scores: Mapping[int, tuple[float, float | None]]) -> None:
        """Held-out (nats, bits per byte) by context, after a number of trained tokens."""
        for context, (loss, bits) in scores.items():
            figures = {} if bits is None else {"bits_per_byte": bits}
            self._write("eval", step, tokens=tokens, loss=loss, sequence_length=context, **figures)

    def event(self, step: int, message: str) -> None:
        self._write("event", step, message=message)

    def flush(self) -> None:
        """What is recorded so far outlives a kill, as the checkpoint written after it does."""
        if self._board is not None:  # the metrics are on the file line by line
            self._try("metrics", self._board.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._board is not None:
            self._try("metrics", self._board.close)

    def _write(self, kind: Literal["step", "eval", "event"], step: int, **values: Any) -> None:
        for writer in (self._writer, self._board):
            if writer is not None:
                self._try(f"metrics of step {step}", getattr(writer, kind), step, **values)

    def _try(self, what: str, write: Callable[..., Any], *values: Any, **named: Any) -> None:
        try:
            write(*values, **named)
        except OSError as error:
            log.warning("%s were not written: %s; training goes on", what, error)
