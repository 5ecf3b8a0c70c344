"""What a report shows, as plain data: lists, dicts, numbers and text, so that it depends on no other package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

Row = Mapping[str, Any]
_MOVE_KEYS = ("rank", "step", "kind", "label", "start", "duration")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything on the page. Only ``title`` is needed: a section without data says that nothing was recorded.

    Fields:
        title: the page's heading.
        summary: one sentence under the heading.
        headline: held-out bits per byte, a dict for each context length: ``context`` (tokens), ``model``, and any
            number of baselines by name (``bigram``, ``zlib``); None where not measured.
        steps: the "step" records of `read_metrics` (loss in nats a token).
        evals: the "eval" records (``step``, ``sequence_length``, ``loss``).
        events: the "event" records (``step``, ``message``).
        ranks: a dict for each rank: ``rank`` and any of ``device``, ``tokens``, ``mask_area`` (allowed pairs),
            ``tokens_per_s``, ``memory_bytes`` (peak), ``memory_limit_bytes``; see ``axes``.
        axes: sizes of the plan's axes by name; ``ranks`` then have their coordinates by the same names, and any of
            ``layers`` (text) and ``parameters`` (elements kept).
        num_parameters: of the whole model.
        ranges: named ranges of profiled steps: ``rank``, ``step``, ``name``, ``start_ms``, ``duration_ms``; one named
            "step" for every rank and step.
        num_tokens: length of the global sequence that ``ownership`` splits.
        ownership: for each rank its segments (start, stop, step) in global positions.
        layout: name of that layout.
        timeline: boxes of one attention schedule: ``rank``, ``step`` (the round), ``kind`` ("compute" or "send"),
            ``label``, ``start``, ``duration``; and where they apply ``bytes`` and ``peer`` (a send's receiver),
            ``area`` (allowed pairs of a block), ``lane`` (a name for a further row of the same rank and kind).
        time_unit: the unit of the timeline's times.
        schedule: name of the schedule drawn.
        prompt, completion: a sample of the trained model.
        config, plan, hardware, versions: resolved settings.
        command: the command line.
        metrics_file: where all records are.
        notes: sentences on what is unverified or unusual.

    Raises:
        ValueError: data that is not plain, a segment outside the sequence, a timeline entry without its keys or with
            a time that is not finite. Losses, rates and headline figures may be NaN: the page shows them as such.
    """

    title: str
    summary: str = ""
    headline: Sequence[Row] = ()
    steps: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    events: Sequence[Row] = ()
    ranks: Sequence[Row] = ()
    axes: Row = field(default_factory=dict)
    num_parameters: int = 0
    ranges: Sequence[Row] = ()
    num_tokens: int = 0
    ownership: Sequence[Sequence[tuple[int, int, int]]] = ()
    layout: str = ""
    timeline: Sequence[Row] = ()
    time_unit: str = "units"
    schedule: str = ""
    prompt: str = ""
    completion: str = ""
    config: Row = field(default_factory=dict)
    plan: Row = field(default_factory=dict)
    hardware: Row = field(default_factory=dict)
    versions: Row = field(default_factory=dict)
    command: str = ""
    metrics_file: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_plain(getattr(self, item.name), item.name)
        for row in self.headline:
            _need(row, ("context", "model"), "headline")
        for row in self.steps:
            _need(row, ("step",), "steps")
        for row in self.evals:
            _need(row, ("step", "sequence_length", "loss"), "evals")
        for row in self.events:
            _need(row, ("step", "message"), "events")
        for row in self.ranks:
            _need(row, ("rank",), "ranks")
        for row in self.ranges:
            _need(row, ("rank", "step", "name", "start_ms", "duration_ms"), "ranges")
        for rank, segments in enumerate(self.ownership):
            for segment in segments:
                _check_segment(rank, segment, self.num_tokens)
        for row in self.timeline:
            _check_move(row)


def _check_plain(value: object, where: str) -> None:
    if value is None or isinstance(value, str | bool | int | float):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ValueError(
                    f"report data needs text or integer keys, got {key!r} in {where}; convert it with str()"
                )
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise ValueError(
            f"report data must be plain (dict, list, number, text, None), got {type(value).__name__} at {where}; "
            "convert it first (tensors with .item() or .tolist(), paths with str())"
        )


def _need(row: Row, keys: Sequence[str], where: str) -> None:
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"every entry of {where} needs {', '.join(keys)}, got {dict(row)!r}; add {missing[0]!r}")


def _check_segment(rank: int, segment: Sequence[int], num_tokens: int) -> None:
    whole = len(segment) == 3 and all(type(number) is int for number in segment)
    if not whole or not 0 <= segment[0] < segment[1] <= num_tokens or segment[2] < 1:
        raise ValueError(
            f"ownership segments are (start, stop, step) inside 0..{num_tokens}, got {tuple(segment)!r} of rank {rank};"
            " leave empty segments out and set num_tokens to the global length"
        )


def _check_move(row: Row) -> None:
    _need(row, _MOVE_KEYS, "timeline")
    if row["kind"] not in ("compute", "send"):
        raise ValueError(
            f"a timeline entry's kind must be compute or send, got {row['kind']!r}; map other kinds to these"
        )
    start, length = row["start"], row["duration"]
    if not (math.isfinite(start) and math.isfinite(length) and length >= 0):
        raise ValueError(
            f"timeline times must be finite and durations 0 or more, got {dict(row)!r}; check the simulation"
        )
