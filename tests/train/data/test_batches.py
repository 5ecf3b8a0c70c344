from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from longspan.train.data.batches import (
    NO_LABEL,
    Batch,
    BatchPlan,
    Stage,
    document_positions,
    draw,
    plan_batches,
    warmup_plan,
)
from longspan.train.data.stream import TokenStream
from tests.train.data.corpora import SEPARATOR, constant_plan, corpus_of, document_lengths, seeds, write_corpus

packings = st.sampled_from(["stream", "documents"])


@given(
    document_lengths,
    seeds,
    packings,
    st.integers(0, 200),
    st.integers(1, 9),
    st.integers(1, 13),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_the_union_over_ranks_is_the_single_rank_batch(
    lengths: list[int],
    seed: int,
    packing: str,
    position: int,
    rows: int,
    length: int,
    data_size: int,
    num_micro: int,
) -> None:
    assume(rows >= data_size * num_micro)
    with corpus_of(lengths) as corpus:
        stream = TokenStream(corpus, seed)
        single = draw(stream, position, rows=rows, length=length, packing=packing)  # type: ignore[arg-type]
        parts = [
            draw(
                stream,
                position,
                rows=rows,
                length=length,
                packing=packing,  # type: ignore[arg-type]
                data_rank=rank,
                data_size=data_size,
                micro=micro,
                num_micro=num_micro,
            )
            for rank in range(data_size)
            for micro in range(num_micro)
        ]
    for name in ("tokens", "labels"):
        whole = getattr(single, name)
        assert torch.equal(torch.cat([getattr(part, name).reshape(-1) for part in parts]), whole.reshape(-1))
        assert whole.dtype == torch.int64
    assert {part.position for part in parts} == {single.position} == {position + rows * length}
    assert sum(part.num_labels for part in parts) == single.num_labels == int((single.labels != NO_LABEL).sum())
    if packing == "documents":
        assert sum((part.lengths or () for part in parts), ()) == single.lengths
        assert single.tokens.shape == (1, rows * length)
    else:
        assert single.lengths is None and single.tokens.shape == (rows, length)


@given(document_lengths, seeds, st.integers(0, 200), st.integers(1, 5), st.integers(1, 13))
def test_labels_by_the_definition(lengths: list[int], seed: int, position: int, rows: int, length: int) -> None:
    with corpus_of(lengths) as corpus:
        stream = TokenStream(corpus, seed)
        following = torch.from_numpy(stream.read(position + 1, rows * length).tokens)
        plain = draw(stream, position, rows=rows, length=length)
        packed = draw(stream, position, rows=rows, length=length, packing="documents")
    assert torch.equal(plain.labels.reshape(-1), following)
    assert plain.num_labels == rows * length
    tokens = packed.tokens[0]
    # Documents end with their separator, and nowhere else: that is where a label would cross.
    expected = torch.where(tokens == SEPARATOR, torch.tensor(NO_LABEL), following)
    assert torch.equal(packed.labels[0], expected)


@given(document_lengths, seeds, st.integers(0, 200), st.integers(1, 5), st.integers(1, 13))
def test_document_lengths_and_positions(lengths: list[int], seed: int, position: int, rows: int, length: int) -> None:
    with corpus_of(lengths) as corpus:
        batch = draw(TokenStream(corpus, seed), position, rows=rows, length=length, packing="documents")
    expected, previous = [], SEPARATOR
    for index, token in enumerate(batch.tokens[0].tolist()):
        fresh = index == 0 or index % length == 0 or previous == SEPARATOR
        expected.append(0 if fresh else expected[-1] + 1)
        previous = token
    assert batch.positions().tolist() == expected
    assert batch.lengths is not None and sum(batch.lengths) == rows * length
    assert max(batch.lengths) <= length and min(batch.lengths) > 0


def test_positions_of_plain_rows(tmp_path: Path) -> None:
    batch = draw(TokenStream(write_corpus(tmp_path, [3, 4])), 0, rows=2, length=5)
    assert batch.positions().tolist() == [0, 1, 2, 3, 4]
    assert document_positions((2, 1, 3)).tolist() == [0, 1, 0, 0, 1, 2]


def flat(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [(b.tokens.tolist(), b.labels.tolist(), b.lengths, b.position, b.step, b.micro) for b in batches]


@given(document_lengths, seeds, packings, st.integers(0, 9), st.integers(1, 3))
def test_resuming_anywhere_is_never_having_stopped(
    lengths: list[int], seed: int, packing: str, step: int, data_size: int
) -> None:
    plan = BatchPlan(
        stages=(Stage(steps=4, rows=6, length=3), Stage(steps=5, rows=3, length=7)),
        packing=packing,  # type: ignore[arg-type]
        micro_rows=None if data_size == 2 else 1,
    )
    whole: list[Batch] = []
    with corpus_of(lengths) as corpus:
        for rank in range(data_size):
            whole = list(plan_batches(TokenStream(corpus, seed), plan, data_rank=rank, data_size=data_size))
            rest = plan_batches(TokenStream(corpus, seed), plan, step=step, data_rank=rank, data_size=data_size)
            assert flat(list(rest)) == flat([batch for batch in whole if batch.step >= step])
    assert whole[-1].position == plan.num_tokens == 4 * 18 + 5 * 21


def test_resuming_under_another_plan_goes_on_where_it_was(tmp_path: Path) -> None:
    stream = TokenStream(write_corpus(tmp_path, [13, 29, 5]), 7)
    before = list(plan_batches(stream, constant_plan(steps=2, rows=3, length=5)))
    after = list(plan_batches(stream, constant_plan(steps=5, rows=2, length=11), step=2, position=before[-1].position))
    drawn = torch.cat([batch.tokens.reshape(-1) for batch in before + after])
    assert np.array_equal(drawn, stream.read(0, 2 * 15 + 3 * 22).tokens)


def test_plan_positions() -> None:
    plan = warmup_plan(steps=10, start_length=8, length=64, tokens=128, fraction=0.5)
    assert [plan.at(step).length for step in range(10)] == [8, 16, 16, 32, 32, 64, 64, 64, 64, 64]
    assert all(shape.rows * shape.length == 128 for shape in map(plan.at, range(10)))
    assert [plan.at(step).position for step in range(10)] == list(range(0, 1280, 128))
    assert plan.max_length == 64 and plan.num_tokens == 1280
    assert [stage.length for stage in warmup_plan(steps=9, start_length=5, length=17, rows=2).stages] == [5, 10, 17]
    assert warmup_plan(steps=9, start_length=17, length=17, rows=2) == constant_plan(steps=9, rows=2, length=17)
    assert warmup_plan(steps=1, start_length=5, length=17, rows=2, fraction=1).stages[-1].length == 17


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 70), st.floats(0, 1))
def test_warm_up_has_all_steps_and_ends_at_full_length(steps: int, start: int, more: int, fraction: float) -> None:
    plan = warmup_plan(steps=steps, start_length=start, length=start + more, rows=3, fraction=fraction)
    assert plan.num_steps == steps
    found = [plan.at(step).length for step in range(steps)]
    assert found == sorted(found) and found[-1] == start + more


def test_micro_batches_are_as_many_on_every_rank() -> None:
    plan = constant_plan(steps=1, rows=7, length=4, micro_rows=2)
    assert [plan.num_micro(7, size) for size in (1, 2, 3)] == [4, 2, 2]
    with pytest.raises(ValueError, match=r"7 rows must give each of 4 data ranks at least 2"):
        constant_plan(steps=1, rows=7, length=4, micro_rows=1).check(4)


def test_refusals(tmp_path: Path) -> None:
    stream = TokenStream(write_corpus(tmp_path, [5]))
    cases = [
        ({"rows": 2, "data_size": 3}, "needs a row"),
        ({"rows": 2, "length": 0}, "needs a row"),
        ({"rows": 2, "data_rank": 1}, "data_rank must be"),
        ({"rows": 2, "packing": "rows"}, "'stream' or 'documents'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            draw(stream, 0, **({"length": 3} | options))  # type: ignore[arg-type]
    plan = constant_plan(steps=3, rows=2, length=4)
    for step in (-1, 3):
        with pytest.raises(ValueError, match=r"step must be in \[0, 3\)"):
            plan.at(step)
    for options, message in [
        ({"tokens": 100}, "multiple of every shorter length"),
        ({}, "either tokens or rows"),
        ({"tokens": 64, "rows": 2}, "either tokens or rows"),
        ({"rows": 2, "start_length": 99}, "start_length"),
        ({"rows": 2, "fraction": 2}, "fraction"),
        ({"rows": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            warmup_plan(**({"steps": 10, "start_length": 8, "length": 64} | options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one stage"):
        BatchPlan(stages=())
    with pytest.raises(ValueError, match="micro_rows"):
        constant_plan(steps=1, rows=1, length=1, micro_rows=0)
