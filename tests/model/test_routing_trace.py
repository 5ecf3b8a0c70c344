"""The routing trace: every token once and in its place, whole or split, with recomputation, through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.model.decoder import build
from longspan.model.recompute import apply_recompute
from longspan.model.routing_trace import RoutingTrace, record_routing
from tests.model.test_decoder import BASE as DENSE
from tests.model.test_moe import BASE, decoder, ids
from tests.ranks import run_ranks


def whole() -> RoutingTrace:
    model = decoder()
    with record_routing(model) as recorder:
        model(ids(13))
        model(ids(4, rows=3))
    model(ids(5))  # not recorded
    return recorder.trace()


def assert_equal(a: RoutingTrace, b: RoutingTrace) -> None:
    assert np.array_equal(a.experts, b.experts) and a.num_experts == b.num_experts
    assert np.array_equal(a.layers, b.layers) and np.array_equal(a.row_lengths, b.row_lengths)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-5)


def test_every_token_stands_once_and_in_order(tmp_path: Path) -> None:
    trace = whole()
    assert trace.experts.shape == (3, 2 * 13 + 3 * 4, 3) and trace.experts.dtype == np.int32
    assert trace.layers.tolist() == [0, 2, 3] and trace.row_lengths.tolist() == [13, 13, 4, 4, 4]
    assert np.allclose(trace.weights.sum(-1), 1)
    model = decoder()
    seen = []
    model.blocks[2].register_forward_hook(lambda block, args, out: seen.append(out[1].experts))
    for row in (*ids(13), *ids(4, rows=3)):
        model(row[None])
    assert np.array_equal(trace.experts[1], torch.cat(seen, dim=1)[0].numpy())
    trace.save(tmp_path / "trace")
    assert_equal(RoutingTrace.load(tmp_path / "trace"), trace)


@pytest.mark.parametrize("mode", ["full", "attention"])
def test_recomputed_blocks_are_recorded_once(mode: str) -> None:
    model = decoder()
    apply_recompute(model, mode)  # pyright: ignore[reportArgumentType]
    with record_routing(model) as recorder:
        for x in (ids(13), ids(4, rows=3)):
            model.loss(x, x)[0].backward()
    assert_equal(recorder.trace(), whole())


def split(rank: int, world: int) -> RoutingTrace:
    model = decoder()
    with record_routing(model) as recorder:
        for length, rows in ((13, 2), (4, 3)):
            ctx = SequenceContext(masks.causal(length), method="zigzag")
            model(ctx.local(ids(length, rows)), ctx)
    return recorder.trace()


def test_split_sequences_are_put_together_on_all_ranks() -> None:
    for trace in run_ranks(split, 2):
        assert_equal(trace, whole())


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a model with experts"), record_routing(build(DENSE, device="cpu")):
        pass
    with record_routing(decoder()) as recorder, pytest.raises(ValueError, match="needs a forward"):
        recorder.trace()
    np.savez(tmp_path / "x.npz", experts=np.zeros(3))
    with pytest.raises(ValueError, match="routing trace must be an npz file"):
        RoutingTrace.load(tmp_path / "x.npz")
    good = whole()
    with pytest.raises(ValueError, match=r"of 3 layers and 26 tokens"):
        RoutingTrace(good.experts, good.weights, good.layers, good.row_lengths[:2], BASE.num_layers)
