"""Kernels that run on CPU against the dense formula in float64: masks x shapes x head groupings x dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from longspan.attention import masks
from longspan.attention.bands import cut, shift
from longspan.attention.kernels import KERNELS, calls
from longspan.attention.kernels.contract import row_sums, stand_in
from longspan.attention.kernels.cpu_flash import CpuFlash
from longspan.attention.kernels.reference import Reference
from longspan.attention.merge import merge
from tests.attention.kernels.blocks import MASKS, RANGES, block, errors, oracle, plain_errors, run, tensors

HERE = ["reference", "cpu_flash"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles, masks and joins at the size of the tests' blocks, so that every kind of call occurs."""
    monkeypatch.setattr(calls, "TILE_ROWS", 4)
    monkeypatch.setattr(calls, "MAX_MASK", 24)
    monkeypatch.setattr(calls, "CALL_PAIRS", 8)
    calls.plan_calls.cache_clear()
    yield
    calls.plan_calls.cache_clear()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("mask", MASKS)
def test_float64_is_exact(name: str, mask: str, small_tiles: None) -> None:
    for ranges in RANGES:
        bands, num_q, num_k = block(mask, ranges)
        for h, g in ((1, 1), (4, 2), (4, 1), (3, 3)):
            inputs = tensors(num_q, num_k, h, g)
            truth = oracle(*inputs, bands, scale=0.3)
            assert max(errors(run(KERNELS[name](), *inputs, bands, truth, scale=0.3), truth).values()) < 1e-12


def limit(plain: float, one_key: bool = False) -> float:
    """Twice the plain formula's error. With one key a row that formula is exact (softmax of one score is 1, whatever
    the score), where P = exp(score - lse) rounds."""
    return max(2 * plain, 4e-7 if one_key else 0.0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype: torch.dtype, mask: str) -> None:
    bands, num_q, num_k = block(mask, "square")
    for name in HERE:
        for h, g in ((4, 4), (4, 1)):
            inputs = tensors(num_q, num_k, h, g, d=16, b=8, dtype=dtype)
            truth = oracle(*inputs, bands, scale=0.25)
            found = errors(run(KERNELS[name](), *inputs, bands, truth, scale=0.25), truth)
            allowed = plain_errors(*inputs, bands, truth, scale=0.25)
            for what in ("out", "dq", "dk", "dv"):
                assert found[what] <= limit(allowed[what], mask == "self_only"), (name, what)
            assert found["lse"] < (1e-6 if name == "reference" or dtype != torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", "documents", "window_both", "odd", "after"])
@pytest.mark.parametrize("name", HERE)
def test_blocks_of_keys_add_up_to_the_whole(name: str, mask: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]()
    bands, num_q, num_k = block(mask, "square")
    q, k, v, dout = tensors(num_q, num_k, 4, 2, d=8, b=8, dtype=dtype)
    truth = oracle(q, k, v, dout, bands, scale=0.3)
    edges = [0, 9, 10, num_k]
    parts = [(slice(a, b), shift(cut(bands, (0, num_q), (a, b)), 0, -a)) for a, b in pairwise(edges)]
    out, lse = merge(kernel.forward(q, k[:, s], v[:, s], local, scale=0.3, softcap=None) for s, local in parts)
    delta = row_sums(dout, out)
    dq, dk, dv = torch.zeros_like(out), [], []
    for s, local in parts:
        grads = kernel.backward(dout, q, k[:, s], v[:, s], lse, delta, local, scale=0.3, softcap=None)
        dq += grads[0]
        dk.append(grads[1])
        dv.append(grads[2])
    got = {"out": out, "lse": lse, "dq": dq, "dk": torch.cat(dk, 1), "dv": torch.cat(dv, 1)}
    found = errors({what: x.double().numpy() for what, x in got.items()}, truth)
    if dtype == torch.float64:
        assert max(found.values()) < 1e-12
    else:
        allowed = plain_errors(q, k, v, dout, bands, truth, scale=0.3)
        for what in ("out", "dq", "dk", "dv"):
            assert found[what] <= limit(allowed[what]), what


@pytest.mark.parametrize("mask", ["full", "causal", "window", "odd"])
@pytest.mark.parametrize("softcap", [0.7, 20.0])
def test_softcap(mask: str, softcap: float) -> None:
    bands, num_q, num_k = block(mask, "wide")
    inputs = tensors(num_q, num_k, 4, 2)
    truth = oracle(*inputs, bands, scale=0.9, softcap=softcap)
    got = run(Reference(), *inputs, bands, truth, scale=0.9, softcap=softcap)
    assert max(errors(got, truth).values()) < 1e-12


@pytest.mark.parametrize("name", HERE)
def test_unusual_strides_and_empty_blocks(name: str, small_tiles: None) -> None:
    kernel = KERNELS[name]()
    bands, num_q, num_k = block("odd", "square")
    q, k, v, dout = tensors(num_q, num_k, 4, 2)
    truth = oracle(q, k, v, dout, bands, scale=0.3)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    dims_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v, dout)]
    for inputs in (heads_first, dims_first):
        q, k, v, dout = inputs
        assert max(errors(run(kernel, q, k, v, dout, bands, truth, scale=0.3), truth).values()) < 1e-12
    for q_stop, k_stop in ((0, 5), (5, 0), (0, 0)):
        inputs = q[:, :q_stop], k[:, :k_stop], v[:, :k_stop], dout[:, :q_stop]
        truth = oracle(*inputs, (), scale=0.3)
        assert max(errors(run(kernel, *inputs, (), truth, scale=0.3), truth).values()) == 0


@pytest.mark.parametrize("name", HERE)
def test_nothing_is_read_before_it_is_written(name: str, small_tiles: None) -> None:
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for mask in MASKS:
            bands, num_q, num_k = block(mask, "square")
            inputs = tensors(num_q, num_k, 2, 1)
            truth = oracle(*inputs, bands, scale=0.3)
            assert max(errors(run(KERNELS[name](), *inputs, bands, truth, scale=0.3), truth).values()) < 1e-12
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_alone() -> None:
    for name in HERE:
        bands, num_q, num_k = block("documents", "square")
        inputs = tensors(num_q, num_k, 4, 2, dtype=torch.float32)
        before = [x.clone() for x in inputs]
        truth = oracle(*inputs, bands)
        run(KERNELS[name](), *inputs, bands, truth, scale=5**-0.5)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_a_gradient_through_lse_alone(name: str) -> None:
    """A gradient of lse arrives as part of delta; rows of dout may then be zero."""
    bands, num_q, num_k = block("documents", "square")
    q, k, v, dout = tensors(num_q, num_k, 4, 2)
    dout[:, ::2] = 0
    truth = oracle(q, k, v, dout, bands, scale=0.3)
    dlse = torch.randn(truth.lse.shape, dtype=torch.float64)
    lse, delta = (torch.from_numpy(x) for x in (truth.lse, truth.delta))
    got = KERNELS[name]().backward(dout, q, k, v, lse, delta - dlse, bands, scale=0.3, softcap=None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    share = [x.repeat_interleave(2, dim=2).transpose(1, 2) for x in leaves[1:]]
    scores = (leaves[0].transpose(1, 2) @ share[0].transpose(-1, -2)) * 0.3
    scores = scores.masked_fill(~MASKS["documents"].dense(), -torch.inf)
    out = (scores.softmax(-1) @ share[1]).transpose(1, 2)
    expected = torch.autograd.grad((out, scores.logsumexp(-1)), leaves, (dout, dlse))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_stand_in_has_the_row_sums(size: float) -> None:
    dout = size * torch.randn(2, 7, 3, 5)
    out = torch.randn(2, 7, 3, 5)
    dout[0, 2] = 0
    delta = row_sums(dout, out)
    same_dout, stand = stand_in(dout, delta, torch.float32)
    torch.testing.assert_close(row_sums(same_dout, stand), delta, rtol=1e-5, atol=1e-6 * size)
    assert torch.equal(same_dout, dout) and (stand[0, 2] == 0).all()
    assert (stand.norm(dim=-1) <= out.norm(dim=-1) * 1.0001).all()
    if size <= 1:
        assert stand_in(dout.half(), delta, torch.float16)[1].isfinite().all()


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, no mask, a mask one key off, local instead of global rows: the comparison notices each."""
    bands, num_q, num_k = block("causal", "square")
    inputs = tensors(num_q, num_k, 4, 2)
    truth = oracle(*inputs, bands, scale=0.3)

    def worst(kernel: CpuFlash, allowed=bands, scale=0.3) -> float:
        return max(errors(run(kernel, *inputs, allowed, truth, scale=scale), truth).values())

    assert worst(CpuFlash()) < 1e-12
    assert worst(CpuFlash(), masks.full(37).bands) > 0.1
    assert worst(CpuFlash(), masks.sliding_window(37, 37, 1).bands) > 0.1
    assert worst(CpuFlash(), masks.sliding_window(37, 35, 0).bands) > 1e-7
    assert worst(CpuFlash(), scale=0.31) > 1e-3

    class Zeros(CpuFlash):
        def forward(self, q, k, v, bands, *, scale, softcap, out=None):
            out, lse = super().forward(q, k, v, bands, scale=scale, softcap=softcap)
            return out * 0, lse

    class LocalRows(CpuFlash):
        def backward(self, dout, q, k, v, lse, delta, bands, *, scale, softcap, out=None):
            return super().backward(dout, q, k, v, lse + 0.1, delta, bands, scale=scale, softcap=softcap)

    class NoDelta(CpuFlash):
        def backward(self, dout, q, k, v, lse, delta, bands, *, scale, softcap, out=None):
            return super().backward(dout, q, k, v, lse, delta * 0, bands, scale=scale, softcap=softcap)

    assert min(worst(Zeros()), worst(LocalRows()), worst(NoDelta())) > 0.01
