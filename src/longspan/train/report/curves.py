"""The report's curves over the steps: loss, throughput and memory, learning rate and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from longspan.train.markup import Child, tag
from longspan.train.report.data import ReportData
from longspan.train.report.figures import chart_of, first_and_last, legend, nothing, spans
from longspan.train.report.tables import folded, table
from longspan.train.svg import Chart, Series
from longspan.train.units import bytes_text, count

_SMOOTH_FROM = 80  # steps from which the loss gets a running mean beside the raw line
_COLUMNS = ("step", "sequence_length", "tokens", "loss", "aux_loss", "learning_rate", "gradient_norm")
_COLUMNS += ("tokens_per_s", "mfu", "memory_bytes", "data_wait_s", "time_s")


def loss(data: ReportData) -> Child:
    if not data.steps:
        return nothing("no training step was finished")
    raw = [(row["step"], row.get("loss")) for row in data.steps]
    smooth = len(raw) >= _SMOOTH_FROM
    series = [Series(label="loss", points=raw, faint=smooth)]
    entries = [("s0", "training loss", "")]
    if smooth:
        window = max(3, len(raw) // 40 | 1)
        series.append(Series(label=f"mean of {window}", points=_running_mean(raw, window)))
        entries = [("s0", f"training loss: every step (thin) and the mean over {window} steps", "")]
    lengths = sorted({row["sequence_length"] for row in data.evals})
    for index, length in enumerate(lengths, 1):
        points = [(row["step"], row["loss"]) for row in data.evals if row["sequence_length"] == length]
        style = f"s{index % 8}"
        series.append(Series(label=f"held out at {length:,}", points=points, kind="dots", style=style))
        entries.append((style, f"held out at {length:,}", "dot"))
    strip = spans(data.steps)
    chart = Chart(
        title="Loss by step",
        description=first_and_last(raw, "loss")
        + (f" The sequence length takes {len(strip)} value(s)." if strip else ""),
        series=series,
        x_label="step",
        y_label="loss, nats per token",
        y_text=lambda y: f"{y:.3g}",
        spans=strip,
        span_label="sequence length",
    )
    lost = [str(step) for step, y in raw if y is not None and not math.isfinite(y)]
    warning = None
    if lost:
        named = ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else "")
        warning = tag(
            "p", f"The loss is not finite at {len(lost)} of {len(raw)} steps: {named} (marked ×).", class_="warn"
        )
    captions = []
    if len(strip) > 1:
        captions.append("The strip above the curve is the sequence length, which grows during training.")
    if not data.evals:
        captions.append("No held-out loss was recorded.")
    tables = [folded("Training steps as a table", table(_where(data, "Training steps."), data.steps, _COLUMNS))]
    if data.evals:
        names = ("step", "sequence_length", "loss", "bits_per_byte")
        tables.append(folded("Held-out evaluations as a table", table("Held-out evaluations.", data.evals, names)))
    if data.events:
        tables.append(folded("Events as a table", table("Events.", data.events, ("step", "message", "time_s"))))
    note = tag("p", " ".join(captions), class_="caption") if captions else None
    return [warning, chart_of(chart, 330, 260, "loss"), legend(entries), note, tables]


def throughput(data: ReportData) -> Child:
    if not data.steps and not data.ranks:
        return nothing("no step and no rank was measured")
    unknown = "it is known for cards whose peak is known by name, rows that are not packed and models trained whole"
    figures: list[Child] = [
        _curve(data, "tokens_per_s", "tokens per second, all ranks", "s0", count),
        _curve(data, "mfu", "model FLOPs utilisation", "s2", lambda share: f"{100 * share:.3g}%", absent=unknown),
        _curve(data, "memory_bytes", "peak memory of the fullest rank", "s1", bytes_text),
    ]
    if data.ranks:
        columns = ["rank", "device", "tokens", "mask_area", "tokens_per_s", "memory_bytes", "memory_limit_bytes"]
        columns += sorted({name for row in data.ranks for name in row} - {*columns, *data.axes, "layers", "parameters"})
        figures += [tag("h3", "By rank"), table("What each rank held and did.", data.ranks, columns)]
    return figures


def optimizer(data: ReportData) -> Child:
    if not data.steps:
        return nothing("no training step was finished")
    return [
        _curve(data, "learning_rate", "learning rate", "s4", lambda rate: f"{rate:.3g}"),
        _curve(data, "gradient_norm", "norm of the gradient, before clipping", "s3", lambda norm: f"{norm:.3g}"),
    ]


def _curve(
    data: ReportData, key: str, label: str, style: str, text: Callable[[float], str], *, absent: str = ""
) -> Child:
    """One quantity over the steps, or the words that it is not there, or not everywhere."""
    points = [(row["step"], row[key]) for row in data.steps if row.get(key) is not None]
    heading = label[0].upper() + label[1:]
    if not points:
        return tag("p", f"{heading}: not recorded{'; ' if absent else ''}{absent}.", class_="caption")
    chart = Chart(
        title=f"{heading}, by step",
        description=first_and_last(points, label),
        series=[Series(label=label, points=points, style=style)],
        x_label="step",
        y_label=label,
        y_text=text,
        spans=spans(data.steps),
        span_label="sequence length",
        from_zero=True,
        y_base=_binary_unit(points) if text is bytes_text else 1.0,
    )
    some = None
    if len(points) < len(data.steps):
        words = f"{heading}: recorded at {len(points):,} of {len(data.steps):,} steps."
        some = tag("p", words, class_="caption")
    return [chart_of(chart, 240, 220, key.replace("_", "-")), some]


def _running_mean(points: Sequence[tuple[float, float | None]], window: int) -> list[tuple[float, float | None]]:
    """The mean of the ``window`` points around each one, fewer at the ends and at gaps: it does not lag."""
    half = window // 2
    means: list[tuple[float, float | None]] = []
    for index, (x, y) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = [v for _, v in points[index - reach : index + reach + 1] if v is not None and math.isfinite(v)]
        means.append((x, sum(near) / len(near) if y is not None and math.isfinite(y) else None))
    return means


def _binary_unit(points: Sequence[tuple[float, float]]) -> float:
    largest = max((y for _, y in points if math.isfinite(y)), default=1.0)
    return 1024.0 ** int(math.log(max(largest, 1.0), 1024))


def _where(data: ReportData, caption: str) -> str:
    return f"{caption} All records: {data.metrics_file}." if data.metrics_file else caption
