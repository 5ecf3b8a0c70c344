"""Schedules on real gloo ranks: forward and every gradient against dense float64, delays, disagreement, refusals."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch

from longspan.attention import masks
from longspan.context import SequenceContext, attend, attention, prepare, run, shard, unshard
from longspan.context.build import build
from longspan.context.choose import default_layout
from longspan.context.methods import METHODS
from longspan.context.run import bound, rebind, release
from longspan.context.sequence import build_layer
from longspan.layout.tokens import make_layout
from tests.context import ranked
from tests.context.cases import LAYOUTS, MASKS, SHAPES, inputs
from tests.context.ranked import Case
from tests.oracles.attention import dense_attention
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 4)


def _assert_exact(case: Case, got: list[np.ndarray]) -> None:
    q, k, v, dout = inputs(case.mask.num_tokens, case.num_heads, case.num_kv_heads, b=case.batch)
    expected = dense_attention(q, k, v, dout, case.mask.dense().numpy(), scale=0.7, softcap=case.softcap)
    for mine, reference in zip(got, (expected.out, expected.dq, expected.dk, expected.dv), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-11, err_msg=str(case))


ANY_MASK = [name for name in METHODS if name not in ("light_seq", "distributed_mha")]


def _pairs(world: int) -> list[Case]:
    """Every pair of (mask, shape, layout, method) at least once over the worlds, lengths and batches in turn."""
    cases = []
    for number, (mask, method) in enumerate(itertools.product(MASKS, ANY_MASK)):
        layout = LAYOUTS[(number + number // len(ANY_MASK) + world) % 3]
        shape = SHAPES[(number // 3 + world) % len(SHAPES)]
        if (number + number // len(ANY_MASK)) % 2 == world % 2:
            continue  # half of the product in each world: all of it in two
        s = (19, 23, 2)[number % 3] if mask in ("full", "causal") else (19, 23)[number % 2]
        cases.append(Case(MASKS[mask](s), *shape, method, layout, batch=1 + number // 2 % 2))
    cases.append(Case(masks.causal(19), 6, 3, "light_seq", "contiguous"))
    cases.append(Case(masks.causal(19), 4, 2, "descending", "zigzag", softcap=3.0))
    return cases


def test_the_pairs_are_pairs() -> None:
    cases = [case for world in WORLDS for case in _pairs(world)]
    assert {(case.method, case.layout) for case in cases} >= set(itertools.product(ANY_MASK, LAYOUTS))
    shapes = {(case.num_heads, case.num_kv_heads, case.method) for case in cases}
    assert shapes >= {(*shape, method) for shape in SHAPES for method in ANY_MASK}
    assert {case.batch for case in cases} == {1, 2}


@pytest.mark.parametrize("world", WORLDS)
def test_forward_and_gradients_are_exact(world: int) -> None:
    cases = _pairs(world)
    for case, got in zip(cases, run_ranks(ranked.results, world, cases)[0], strict=True):
        _assert_exact(case, got)


@pytest.mark.parametrize("world", [2, 4])
def test_delays_change_nothing(world: int) -> None:
    """Ranks that fall behind, each in its own way, still get every message in its place."""
    cases = [
        Case(MASKS[mask](19), 3, 3, method, layout)
        for mask, method, layout in (
            ("causal", "zigzag", "zigzag"),
            ("documents", "ring", "striped"),
            ("full", "token_ring", "contiguous"),
            ("holes", "burst", "zigzag"),
            ("prefix", "ulysses", "contiguous"),
            ("full", "double_ring", "contiguous"),
            ("causal", "usp", "zigzag"),
            ("window", "opposing", "striped"),
        )
    ]
    for case, got in zip(cases, run_ranks(ranked.delayed_results, world, cases)[0], strict=True):
        _assert_exact(case, got)


@pytest.mark.parametrize("world", [2, 4])
def test_results_are_bit_identical_whatever_comes_first(world: int) -> None:
    """The order of additions is the schedule's and never that of arrival: ranks late by chance change no bit."""
    cases = [
        Case(MASKS[mask](37), 4, 2, method, layout, dtype=torch.float32, kernel="auto")
        for mask, method, layout in (
            ("causal", "zigzag", "zigzag"),
            ("documents", "mask_aware:2", "contiguous"),
            ("documents", "kept_keys:2", "zigzag"),
            ("full", "token_ring", "contiguous"),
            ("causal", "opposing", "zigzag"),
            ("prefix", "ulysses", "contiguous"),
            ("causal", "light_seq", "contiguous"),
            ("window", "burst", "striped"),
        )
    ]
    first, *others = (run_ranks(ranked.delayed_results, world, cases, seed)[0] for seed in range(3))
    for other in others:
        for case, before, after in zip(cases, first, other, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True)), case


def test_two_attentions_in_one_backward() -> None:
    first = Case(masks.causal(19), 2, 1, "zigzag", "zigzag")
    second = Case(masks.sliding_window(13, 3, 1), 3, 3, "ring", "contiguous")
    for got in run_ranks(ranked.two_at_once, 3, first, second):
        _assert_exact(first, got[0])
        _assert_exact(second, got[1])


@pytest.mark.parametrize("how", ["mask", "layout", "method", "heads", "batch", "scale"])
def test_ranks_that_disagree_are_refused_on_all_ranks(how: str) -> None:
    for message, waited_s in run_ranks(ranked.refusal, 2, how):
        assert message.startswith(
            "all ranks must use one mask, layout, schedule, scale and shape, but ranks [1] differ"
        )
        assert "\n" not in message
        assert waited_s < 30  # and not for the time-out, 60 s


@pytest.mark.parametrize(
    ("how", "own"),
    [("length", "the layout must hold the mask's 9"), ("uneven heads", "multiple of KV heads"), ("softcap", "softcap")],
)
def test_a_rank_that_refuses_does_not_leave_the_others_waiting(how: str, own: str) -> None:
    (other, waited_s), (message, _) = run_ranks(ranked.refusal, 2, how)
    assert "but ranks [1] differ" in other and own in message
    assert waited_s < 30


def test_ranks_that_agree_are_not_refused() -> None:
    assert [message for message, _ in run_ranks(ranked.refusal, 2, "nothing")] == ["", ""]


@pytest.mark.parametrize("world", WORLDS)
def test_shard_and_unshard_invert(world: int) -> None:
    assert all(run_ranks(ranked.round_trips, world, LAYOUTS))


def test_the_gradient_of_shard_goes_to_the_rank_own_tokens() -> None:
    total = sum(run_ranks(ranked.shard_gradient, 3))
    np.testing.assert_array_equal(total, 2 * np.arange(7.0))


# One process: no group.


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"softcap": 0.0}, "softcap must be a finite number above 0"),
        ({"softcap": -2.0}, "softcap must be a finite number above 0"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": 0.0}, "scale must be a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        attention(*_local(), mask=masks.causal(8), **settings)


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        attention(*(x.long() for x in _local()), mask=masks.causal(8))


def test_a_released_handle_is_made_anew() -> None:
    handle = prepare(masks.causal(8), num_heads=2, num_kv_heads=1)
    assert prepare(masks.causal(8), num_heads=2, num_kv_heads=1) == handle
    release(handle)
    assert bound(prepare(masks.causal(8), num_heads=2, num_kv_heads=1)).built.num_heads == 2


def test_handles_of_attention_and_of_contexts_do_not_pile_up() -> None:
    gc.collect()  # contexts that earlier tests have left must not go meanwhile
    before = len(run._TABLE)
    for s in range(2, 300):
        attention(torch.zeros(1, s, 1, 1), *(torch.zeros(1, s, 1, 1) for _ in "kv"), mask=masks.causal(s))
    assert len(run._TABLE) <= before + 256
    before = len(run._TABLE)
    context = SequenceContext(masks.causal(8))
    context.attend(*_local(), layer=0)
    assert len(run._TABLE) == before + 1
    del context
    assert len(run._TABLE) == before


def test_programs_for_another_mask_are_refused() -> None:
    wrong = build_layer(masks.full(8), (2, 1, None), 1, 0)
    context = SequenceContext(masks.causal(8))
    context.renew(masks.causal(8), built={(2, 1, None): wrong})
    with pytest.raises(ValueError, match="programs must be built for this mask"):
        context.attend(*_local(), layer=0)
    with pytest.raises(ValueError, match="positions must be one number for each"):
        context.renew(masks.causal(8), np.arange(40))


def _local(s: int = 8, h: int = 2, g: int = 1, d: int = 4):
    return torch.zeros(1, s, h, d), torch.zeros(1, s, g, d), torch.zeros(1, s, g, d)


def test_without_a_group_it_is_attention() -> None:
    for mask in MASKS.values():
        q, k, v, dout = inputs(17, 4, 2)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        chosen = mask(17)
        attention(*leaves, mask=chosen, method="zigzag").backward(dout)
        expected = dense_attention(q.detach(), k.detach(), v.detach(), dout, chosen.dense().numpy())
        for leaf, reference in zip(leaves, (expected.dq, expected.dk, expected.dv), strict=True):
            assert leaf.grad is not None
            np.testing.assert_allclose(leaf.grad.numpy(), reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "spiral"}, "unknown context-parallel method 'spiral'; known: auto, ring, zigzag"),
        ({"kernel": "cutlass"}, "unknown kernel 'cutlass'; known: auto, "),
        ({"layout": "diagonal"}, "unknown layout 'diagonal'; known: contiguous, zigzag, striped"),
        ({"layout": make_layout("zigzag", 9, 1)}, "the mask's 8 tokens on 1 ranks, got one for 9 tokens on 1"),
        ({"layout": make_layout("zigzag", 8, 2)}, "the mask's 8 tokens on 1 ranks, got one for 8 tokens on 2"),
        ({"mask": masks.causal(9)}, r"q must be \(batch, 9 local tokens, 2 heads, head_dim\)"),
        ({"softcap": 1.0, "kernel": "cpu_flash"}, "softcap"),
    ],
)
def test_options_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    options = {"mask": masks.causal(8), **change}
    with pytest.raises(ValueError, match=message) as caught:
        attention(*_local(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((1, 7, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4), "q must be"),
        ((1, 8, 2, 4), (1, 7, 1, 4), (1, 7, 1, 4), "k must be"),
        ((1, 8, 2, 4), (1, 8, 1, 4), (1, 8, 2, 4), "v must be"),
        ((1, 8, 2, 4), (1, 8, 1, 5), (1, 8, 1, 5), "must share batch, head dim"),
        ((1, 8, 2, 4), (2, 8, 1, 4), (2, 8, 1, 4), "must share batch, head dim"),
        ((1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4), "multiple of KV heads, got 3 and 2"),
        ((8, 2, 4), (1, 8, 2, 4), (1, 8, 2, 4), "q, k and v must be .*got q .8, 2, 4."),
        ((8, 8), (8, 8), (8, 8), "q, k and v must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(q, k, v, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), mask=masks.causal(8))
    assert "\n" not in str(caught.value)


def test_dtypes_must_agree() -> None:
    q, k, v = _local()
    with pytest.raises(ValueError, match="must share batch, head dim, dtype and device"):
        attention(q, k.double(), v, mask=masks.causal(8))


def test_shard_and_unshard_refuse() -> None:
    mask = masks.causal(8)
    with pytest.raises(ValueError, match="dim 1 of x must be the mask's 8 tokens, got 7"):
        shard(torch.zeros(1, 7), mask, None)
    with pytest.raises(ValueError, match="dim 0 of x must be this rank's 8 tokens, got 7"):
        unshard(torch.zeros(7), mask, None, dim=0)
    with pytest.raises(ValueError, match="unshard has no gradient"):
        unshard(torch.zeros(8, requires_grad=True), mask, None, dim=0)


def test_handles_are_kept_rebound_and_released() -> None:
    mask = masks.causal(8)
    handle = prepare(mask, num_heads=2, num_kv_heads=1)
    assert handle == prepare(mask, num_heads=2, num_kv_heads=1)
    assert handle != prepare(mask, num_heads=2, num_kv_heads=1, scale=0.5)
    with pytest.raises(ValueError, match="handle 123456 is not bound"):
        attend(*_local(), 123456)
    context = SequenceContext(mask)
    own = context.handle(2, 1, None, None, None)
    other = masks.full(8)
    rebind(own, build(other, world=1, rank=0, num_heads=2, num_kv_heads=1))
    q, k, v, _ = inputs(8, 2, 1, d=4)
    full = dense_attention(q, k, v, q, other.dense().numpy()).out
    np.testing.assert_allclose(attend(q, k, v, own), full, rtol=0, atol=1e-12)
    release(own)
    with pytest.raises(ValueError, match="is not bound"):
        bound(own)


def test_the_context_of_a_model() -> None:
    mask = masks.documents([5, 3])
    positions = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    context = SequenceContext(mask, positions=positions)
    assert context.positions.tolist() == positions.tolist()
    q, k, v, _ = inputs(8, 2, 1)
    got = context.attend(q, k, v, layer=0, window=2, scale=0.3)
    near = masks.documents([5, 3]).dense().numpy() & masks.sliding_window(8, 1, 0).dense().numpy()
    np.testing.assert_allclose(got, dense_attention(q, k, v, q, near, scale=0.3).out, rtol=0, atol=1e-12)
    context.renew(masks.causal(8))
    assert context.positions.tolist() == list(range(8))
    got = context.attend(q, k, v, layer=1, window=2, scale=0.3)
    near = masks.sliding_window(8, 1, 0).dense().numpy()
    np.testing.assert_allclose(got, dense_attention(q, k, v, q, near, scale=0.3).out, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least the token itself, got 0"):
        context.attend(q, k, v, layer=0, window=0)


def test_the_default_layout_balances() -> None:
    assert default_layout(masks.causal(64), 4).name == "zigzag"
    assert default_layout(masks.full(64), 4).name == "contiguous"
    assert default_layout(masks.causal(64), 1).name == "contiguous"
    assert default_layout(masks.causal(64), 4, "ring").name == "contiguous"
    assert default_layout(masks.documents([40, 3, 5, 9, 7]), 4).name == "balanced"
    assert default_layout(masks.documents([16] * 4), 4).name == "contiguous"
