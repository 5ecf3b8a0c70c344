"""Metrics: what is written is read back, a resume leaves one value a step, and only a torn last line is forgiven."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longspan.train.metrics import MetricsWriter, read_metrics


def put(writer: MetricsWriter, step: int, loss: float) -> None:
    writer.step(
        step, loss=loss, tokens_per_s=10.0, memory_bytes=7, learning_rate=0.1, gradient_norm=1.0, sequence_length=512
    )


def test_round_trip_and_flush(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    now = iter([100.0, 101.5, 103.0, 104.0])
    with MetricsWriter(path, clock=lambda: next(now)) as writer:
        put(writer, 1, 0.1 + 0.2)
        assert len(read_metrics(path)) == 1  # on the file before the writer closes
        writer.eval(1, loss=2.5, sequence_length=8192, bits_per_byte=3.6)
        writer.event(1, "saved")
    records = read_metrics(path)
    assert [r["kind"] for r in records] == ["step", "eval", "event"]
    assert records[0]["loss"] == 0.1 + 0.2
    assert [r["time_s"] for r in records] == [1.5, 3.0, 4.0]
    assert read_metrics(path, "eval") == [records[1]]


def test_resume_is_single_valued_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, clock=iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).__next__) as writer:
        for step in range(1, 6):
            put(writer, step, float(step))
    with MetricsWriter(path, resume_step=3, clock=iter([50.0, 51.0]).__next__) as writer:
        with pytest.raises(ValueError, match="steps must increase, got step 3 after 3"):
            put(writer, 3, 9.0)
        put(writer, 4, 40.0)
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert records[-1]["time_s"] == 4.0  # 3 s kept, 1 s since the resume
    aside = [json.loads(line) for line in (tmp_path / "m.jsonl.superseded").read_text().splitlines()]
    assert [r["step"] for r in aside] == [4, 5]


def test_resume_after_a_torn_line_does_not_glue_records(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        put(writer, 1, 1.0)
        put(writer, 2, 2.0)
    path.write_bytes(path.read_bytes()[:-9])
    assert [r["step"] for r in read_metrics(path)] == [1]
    with MetricsWriter(path, resume_step=1) as writer:
        put(writer, 2, 3.0)
    assert [r["loss"] for r in read_metrics(path)] == [1.0, 3.0]


def test_every_cut_of_the_last_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        put(writer, 1, 1.0)
        first = path.stat().st_size
        put(writer, 2, 2.0)
    whole = path.read_bytes()
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        assert len(read_metrics(path)) == (2 if end >= len(whole) - 1 else 1)


@pytest.mark.parametrize(
    "line", [b'{"kind": "st\n', b"[1]\n", b'{"kind": "step", "time_s": 1}\n', b"\n", b"\xff\xfe\n", b"12"]
)
def test_other_damage_is_refused_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        put(writer, 1, 1.0)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_not_finite_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        put(writer, 1, math.nan)
        put(writer, 2, math.inf)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
    nan, inf = (r["loss"] for r in read_metrics(path))
    assert math.isnan(nan) and inf == math.inf
    with MetricsWriter(path, resume_step=1):
        pass
    assert math.isnan(read_metrics(path)[0]["loss"])


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        put(writer, 3, 1.0)
        with pytest.raises(ValueError, match="steps must increase, got step 3"):
            put(writer, 3, 1.0)
        with pytest.raises(ValueError, match="plain JSON"):
            writer.event(3, "x", values=[math.nan])
        with pytest.raises(ValueError, match="plain JSON"):
            writer.event(3, "x", values=object())
        with pytest.raises(ValueError, match="'time_s'"):
            writer.event(3, "x", time_s=2.0)
    with pytest.raises(ValueError, match="is closed"):
        put(writer, 4, 1.0)
    with pytest.raises(ValueError, match="new run"):
        MetricsWriter(path)
    with pytest.raises(ValueError, match="0 or more"):
        MetricsWriter(path, resume_step=-1)
    with pytest.raises(ValueError, match="kind"):
        read_metrics(path, "steps")  # pyright: ignore[reportArgumentType]
    assert len(read_metrics(path)) == 1


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    put(writer, 1, 1.0)
    whole = writer._file

    class FullDisk:
        closed = False

        def write(self, data: bytes) -> int:
            whole.write(bytes(data[:5]))
            raise OSError(28, "No space left on device")

        def truncate(self, size: int) -> int:
            return whole.truncate(size)

    writer._file = FullDisk()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match="No space"):
        put(writer, 2, 2.0)
    writer._file = whole
    put(writer, 2, 2.5)
    writer.close()
    assert [r["loss"] for r in read_metrics(path)] == [1.0, 2.5]


def test_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl", resume_step=7) as writer:
        put(writer, 8, 1.0)
    assert read_metrics(tmp_path / "m.jsonl")[0]["step"] == 8
