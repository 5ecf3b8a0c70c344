"""A run's metrics as TensorBoard's event files, by steps and by tokens.

Two folders, two runs to TensorBoard: `steps` and `tokens`, whose horizontal axis is the number of tokens trained on.
They are apart because going on from a checkpoint drops what was written after it by that axis (``purge_step``), so that
one step has one point. The package `tensorboard` is an extra: it is imported where a writer is made.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# By the names of the metrics' records; where one is absent, nothing is written.
_OF_STEP = {
    "loss": "loss/train",
    "aux_loss": "loss/auxiliary",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "data_wait_s": "speed/data_wait_s",
    "memory_bytes": "memory/peak_bytes",
    "sequence_length": "batch/sequence_length",
    "tokens": "batch/tokens",
}
_BY_TOKENS = ("loss", "aux_loss")


def check_tensorboard(folder: Path, *, resumes: bool) -> None:
    """Refuses what could not be written, before training. Raises ValueError: there is no package `tensorboard`, or the
    folder has the events of another run."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "event files are written by the package tensorboard, which is not installed; pip install "
            "'longspan[tensorboard]', or leave out --tensorboard"
        )
    if not resumes and any(folder.glob("*/events.out.tfevents.*")):
        raise ValueError(f"the folder {folder} has the events of another run; choose another --tensorboard folder")


class Board:
    """Writes the event files of one run; on one rank only.

    Args:
        folder: where `steps` and `tokens` go.
        step, tokens: what is done so far; points after it, of a session that went further, are dropped.
    """

    def __init__(self, folder: Path, *, step: int, tokens: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        def writer(name: str, done: int) -> SummaryWriter:
            return SummaryWriter(str(folder / name), purge_step=done + 1, flush_secs=10)

        self._steps, self._tokens = writer("steps", step), writer("tokens", tokens)

    def text(self, step: int, texts: Mapping[str, Any]) -> None:
        """Settings, each as a text of its own."""
        for name, values in texts.items():
            self._steps.add_text(name, f"```json\n{json.dumps(values, indent=2)}\n```", step)

    def step(self, step: int, *, tokens: int, **values: float) -> None:
        """The figures of one optimiser step, after which the run has seen ``tokens`` tokens."""
        for name, tag in _OF_STEP.items():
            value = tokens if name == "tokens" else values.get(name)
            if value is not None:
                self._steps.add_scalar(tag, value, step)
                if name in _BY_TOKENS:
                    self._tokens.add_scalar(tag, value, tokens)

    def eval(self, step: int, *, tokens: int, sequence_length: int, **values: float) -> None:
        """Held-out figures at one context length: ``loss``, and ``bits_per_byte`` where it is known."""
        for name in ("loss", "bits_per_byte"):
            if name in values:
                tag = f"{name}/held_out_at_{sequence_length}"
                self._steps.add_scalar(tag, values[name], step)
                self._tokens.add_scalar(tag, values[name], tokens)

    def event(self, step: int, message: str) -> None:
        self._steps.add_text("events", message, step)

    def flush(self) -> None:
        """Everything is on the file: a checkpoint written now has its points."""
        self._steps.flush()
        self._tokens.flush()

    def close(self) -> None:
        self._steps.close()
        self._tokens.close()
