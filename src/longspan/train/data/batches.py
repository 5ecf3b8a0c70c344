"""Batches: rows of the stream, their labels, and how documents are packed into them.

A step takes the next `rows * length` tokens of the stream, row after row. The parts of a step (data ranks, times the
micro-batches of each) take neighbouring runs of whole rows, so their union is the same whatever their number.

Packing "stream": a row is `length` consecutive tokens under a plain causal mask, documents run on. Packing "documents":
a token sees its own document only. A mask is the same for all rows of a batch, so a part's rows are laid end to end as
ONE row of rows * length tokens, with a document mask in which documents are also cut where a row ends (a document's
attention never costs more than `length` squared, and what a token sees does not depend on how rows are dealt out).

Labels are shifted along the whole stream: the label of a row's last token is the token that follows it in the stream,
in another row or rank. With packing "documents" the last token of a document (its separator) has no label.
Of conversations only what is to be learnt is a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from longspan.layout.weights import share
from longspan.train.data.stream import TokenStream

NO_LABEL = -100
Packing = Literal["stream", "documents"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one data rank computes at once.

    Attributes:
        tokens: int64 (b, s). With packing "documents" b is 1 and s is rows * length.
        labels: int64 (b, s), NO_LABEL where there is none.
        lengths: lengths of the documents of the packed row, which add up to s; None: plain causal rows.
        num_labels: labels that are not NO_LABEL.
        position: position in the stream after the whole step, all ranks and micro-batches: the state to save.
        step: number of the step, from 0.
        micro, num_micro: this is micro-batch `micro` of `num_micro` of the step on this rank.
    """

    tokens: Int64[Tensor, "b s"]
    labels: Int64[Tensor, "b s"]
    lengths: tuple[int, ...] | None
    num_labels: int
    position: int
    step: int = 0
    micro: int = 0
    num_micro: int = 1

    def positions(self) -> Int64[Tensor, " s"]:
        """Positions of a row's tokens within their document (within the row for plain causal rows)."""
        return document_positions(self.lengths or (self.tokens.shape[1],))


def document_positions(lengths: tuple[int, ...]) -> Int64[Tensor, " s"]:
    """0, 1, ... anew for every document of a row."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum()), dtype=torch.int64) - torch.repeat_interleave(starts, sizes)


def draw(
    stream: TokenStream,
    position: int,
    *,
    rows: int,
    length: int,
    data_rank: int = 0,
    data_size: int = 1,
    packing: Packing = "stream",
    micro: int = 0,
    num_micro: int = 1,
    step: int = 0,
) -> Batch:
    """One rank's (micro-)batch of the step that starts at `position`: a pure function of its arguments.

    Args:
        rows, length: rows of the step over all ranks, and tokens of each.
        data_rank, data_size: this rank among those that draw different rows.
        micro, num_micro: which of the rank's micro-batches.

    Raises ValueError where a part would get no row, or for a rank or packing that does not exist.
    """
    parts = data_size * num_micro
    if length < 1 or data_size < 1 or num_micro < 1 or rows < parts:
        raise ValueError(
            f"every data rank needs a row for each micro-batch, got {rows} rows of {length} tokens for "
            f"{data_size} ranks of {num_micro} micro-batches: use more rows or fewer ranks"
        )
    if not (0 <= data_rank < data_size and 0 <= micro < num_micro):
        raise ValueError(
            f"data_rank must be in [0, {data_size}) and micro in [0, {num_micro}), "
            f"got {data_rank} and {micro}: check the plan"
        )
    if packing not in ("stream", "documents"):
        raise ValueError(f"packing must be 'stream' or 'documents', got {packing!r}: choose one")
    mine = share(rows, parts, data_rank * num_micro + micro)
    first, stop = mine.start, mine.stop
    count = (stop - first) * length
    window = stream.read(position + first * length, count + 1)
    tokens, labels, lengths = window.tokens[:-1], window.tokens[1:].copy(), None
    if window.learnt is not None:
        labels[~window.learnt[1:]] = NO_LABEL
    shape = (stop - first, length)
    if packing == "documents":
        starts = np.cumsum((0, *window.lengths[:-1]))
        labels[starts[1:] - 1] = NO_LABEL
        cuts = np.union1d(starts[starts < count], np.arange(0, count + 1, length))
        lengths, shape = tuple(np.diff(cuts).tolist()), (1, count)
    return Batch(
        tokens=torch.from_numpy(tokens.copy()).view(shape),
        labels=torch.from_numpy(labels).view(shape),
        lengths=lengths,
        num_labels=int((labels != NO_LABEL).sum()),
        position=position + rows * length,
        step=step,
        micro=micro,
        num_micro=num_micro,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """`steps` steps of `rows` rows (over all data ranks) of `length` tokens."""

    steps: int
    rows: int
    length: int

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.length) < 1:
            raise ValueError(f"a stage needs steps, rows and length of at least 1, got {self}: leave empty stages out")


class Shape(NamedTuple):
    """A step: its position in the stream (of a run that starts at 0), rows over all ranks, tokens of a row."""

    position: int
    rows: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The shapes of all steps of a run.

    Attributes:
        stages: one after another.
        packing: see this file's head.
        micro_rows: most rows that a data rank computes at once; None: all. Each rank's rows are cut into equally many
            micro-batches, on every rank.
    """

    stages: tuple[Stage, ...]
    packing: Packing = "stream"
    micro_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a batch plan needs at least one stage, got none: add a Stage")
        if self.packing not in ("stream", "documents"):
            raise ValueError(f"packing must be 'stream' or 'documents', got {self.packing!r}: choose one")
        if self.micro_rows is not None and self.micro_rows < 1:
            raise ValueError(
                f"micro_rows must be at least 1, got {self.micro_rows}: leave it out to compute all rows at once"
            )

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(stage.steps * stage.rows * stage.length for stage in self.stages)

    @property
    def max_length(self) -> int:
        return max(stage.length for stage in self.stages)

    def at(self, step: int) -> Shape:
        """The shape of a step. Raises ValueError for a step outside the run."""
        position, before = 0, 0
        for stage in self.stages:
            if 0 <= step - before < stage.steps:
                return Shape(position + (step - before) * stage.rows * stage.length, stage.rows, stage.length)
            before += stage.steps
            position += stage.steps * stage.rows * stage.length
        raise ValueError(f"step must be in [0, {self.num_steps}), got {step}: the run has {self.num_steps} steps")

    def num_micro(self, rows: int, data_size: int) -> int:
        """Micro-batches of a step on every rank. Raises ValueError where some rank has too few rows for as many."""
        num_micro = 1 if self.micro_rows is None else ceil(ceil(rows / data_size) / self.micro_rows)
        if rows < data_size * num_micro:
            raise ValueError(
                f"{rows} rows must give each of {data_size} data ranks at least {num_micro} (its micro-batches of "
                f"micro_rows={self.micro_rows}): use a multiple of the ranks, or fewer ranks"
            )
        return num_micro

    def check(self, data_size: int) -> None:
        """Raises ValueError where some step cannot be dealt out to `data_size` ranks."""
        for stage in self.stages:
            self.num_micro(stage.rows, data_size)


def warmup_plan(
    *,
    steps: int,
    start_length: int,
    length: int,
    tokens: int | None = None,
    rows: int | None = None,
    fraction: float = 0.5,
    packing: Packing = "stream",
    micro_rows: int | None = None,
) -> BatchPlan:
    """Length warm-up: lengths double from `start_length` to `length`.

    Args:
        steps: of the whole run.
        tokens: tokens of every step, constant: shorter rows, more of them (one where a row is longer). Either this or
        rows: rows of every step, constant: shorter rows, cheaper steps.
        fraction: part of the steps shorter than `length`, shared evenly by the shorter lengths, later ones first.

    Raises ValueError where both or neither of tokens and rows are given, or where some length does not divide tokens.
    """
    if (tokens is None) == (rows is None):
        raise ValueError(f"give either tokens or rows of a step, got tokens={tokens} and rows={rows}")
    if not 1 <= start_length <= length:
        raise ValueError(f"start_length must be in [1, length={length}], got {start_length}: start with shorter rows")
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"fraction must be in [0, 1], got {fraction}: it is the part of the steps below the full length"
        )
    lengths = [start_length]
    while lengths[-1] < length:
        lengths.append(min(2 * lengths[-1], length))
    shorter = min(round(steps * fraction), steps - 1) if len(lengths) > 1 else 0
    early = len(lengths) - 1
    sizes = [*(len(share(shorter, early, part)) for part in reversed(range(early))), steps - shorter]
    stages = []
    for size, stage_length in zip(sizes, lengths, strict=True):
        if tokens is not None and tokens > stage_length and tokens % stage_length:
            raise ValueError(
                f"tokens of a step must be a multiple of every shorter length, got {tokens} with {stage_length}: "
                "change one"
            )
        if size:
            stage_rows = rows if tokens is None else max(1, tokens // stage_length)
            assert stage_rows is not None
            stages.append(Stage(steps=size, rows=stage_rows, length=stage_length))
    return BatchPlan(stages=tuple(stages), packing=packing, micro_rows=micro_rows)


def plan_batches(
    stream: TokenStream,
    plan: BatchPlan,
    *,
    step: int = 0,
    position: int | None = None,
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator[Batch]:
    """The batches of a run from `step` on, micro-batch by micro-batch.

    `position`: where the stream goes on; None: where the plan itself puts that step. A run resumed under another plan
    gives the position it saved.
    """
    if position is None:
        position = plan.at(step).position if step < plan.num_steps else plan.num_tokens
    for number in range(step, plan.num_steps):
        shape = plan.at(number)
        num_micro = plan.num_micro(shape.rows, data_size)
        for micro in range(num_micro):
            yield draw(
                stream,
                position,
                rows=shape.rows,
                length=shape.length,
                data_rank=data_rank,
                data_size=data_size,
                packing=plan.packing,
                micro=micro,
                num_micro=num_micro,
                step=number,
            )
        position += shape.rows * shape.length
