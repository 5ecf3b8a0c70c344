"""What the CUDA kernels hand to their libraries, with the libraries written out densely on CPU.

The stand-ins for aten's operators follow their documented meaning: flash attention's window is aligned to the bottom
right corner, cuDNN's causal mask to the top left; both backwards compute delta from ``out`` and take lse as it comes.
The real operators are tested in ``tests/gpu``.
"""

from __future__ import annotations

import inspect
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longspan.attention import masks
from longspan.attention.bands import Band, cut, dense, tighten
from longspan.attention.kernels import cudnn
from longspan.attention.kernels.calls import plan_windows, window
from longspan.attention.kernels.cuda_flash import CudaFlash
from longspan.attention.kernels.cudnn import Cudnn
from longspan.attention.kernels.flex import BLOCK, _block_mask, blocks_of, element_mask, local_cotangents
from longspan.attention.kernels.reference import Reference
from tests.attention.kernels.blocks import MASKS, RANGES, block, errors, oracle, run, tensors


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(b h l d) -> out, lse."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor, scale: float):
    share, g = q.shape[1] // k.shape[1], k.shape[1]
    keys, values = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    p = torch.exp((q @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf) - lse.unsqueeze(-1))
    ds = p * (dout @ values.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
    return ds @ keys, dk.unflatten(1, (g, -1)).sum(2), dv.unflatten(1, (g, -1)).sum(2)


def corner_window(num_q: int, num_k: int, left: int, right: int) -> Tensor:
    i, j = torch.arange(num_q)[:, None], torch.arange(num_k)[None, :]
    corner = num_k - num_q
    return ((left < 0) | (j - i >= corner - left)) & ((right < 0) | (j - i <= corner + right))


def flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                  scale=1.0, window_size_left=-1, window_size_right=-1):  # fmt: skip
    assert cum_seq_q is None and cum_seq_k is None and dropout_p == 0 and not is_causal and not return_debug_mask
    assert (max_q, max_k) == (query.shape[1], key.shape[1]) and {x.stride(-1) for x in (query, key, value)} == {1}
    allowed = corner_window(max_q, max_k, window_size_left, window_size_right)
    assert allowed.any(1).all() and allowed.any(0).all()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = attend(query, key, value, allowed, scale)
    return out.transpose(1, 2), torch.nn.functional.pad(lse, (0, 5), value=torch.nan), None, None, None


def flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                   is_causal, rng_state, unused, *, scale=1.0, window_size_left=-1,
                   window_size_right=-1):  # fmt: skip
    assert cum_seq_q is None and cum_seq_k is None and dropout_p == 0 and not is_causal
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    assert logsumexp.is_contiguous() and grad_out.is_contiguous() and out.is_contiguous()
    assert isinstance(rng_state, Tensor) and isinstance(unused, Tensor)
    allowed = corner_window(max_q, max_k, window_size_left, window_size_right)
    grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = gradients(grad_out, query, key, value, out, logsumexp, allowed, scale)
    return tuple(x.transpose(1, 2) for x in grads)


def cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                  return_debug_mask=False, *, scale=1.0):  # fmt: skip
    assert attn_bias is None and compute_log_sumexp and dropout_p == 0 and not return_debug_mask
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    out, lse = attend(query, key, value, allowed.tril() if is_causal else allowed, scale)
    return out, lse.unsqueeze(-1), None, None, 0, 0, None, None, None


def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                   cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=1.0):  # fmt: skip
    assert attn_bias is None and cum_seq_q is None and cum_seq_k is None and dropout_p == 0
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and grad_out.stride() == out.stride()
    assert logsumexp.shape == (*query.shape[:3], 1) and isinstance(philox_seed, Tensor)
    allowed = torch.ones(max_q, max_k, dtype=torch.bool)
    return gradients(
        grad_out, query, key, value, out, logsumexp.squeeze(-1), allowed.tril() if is_causal else allowed, scale
    )


FAKES = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_cudnn_attention": cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
}


@pytest.mark.parametrize("kernel", [CudaFlash, Cudnn])
@pytest.mark.parametrize("mask", MASKS)
def test_calls_and_their_sums_are_exact(kernel, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fake in FAKES.items():
        monkeypatch.setattr(torch.ops.aten, name, fake)
    monkeypatch.setattr(kernel, "supports", lambda *args, **kwargs: None)
    monkeypatch.setattr(cudnn, "MIN_SQUARE", 3)
    for ranges in RANGES:
        bands, num_q, num_k = block(mask, ranges)
        inputs = tensors(num_q, num_k, 4, 2, dtype=torch.float32)
        truth = oracle(*inputs, bands, scale=0.3)
        assert max(errors(run(kernel(), *inputs, bands, truth, scale=0.3), truth).values()) < 1e-5


@pytest.mark.parametrize("name", FAKES)
def test_stand_ins_have_the_parameters_of_this_torch(name: str) -> None:
    real = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
    mine = list(inspect.signature(FAKES[name]).parameters)
    positional = [n for n, p in inspect.signature(FAKES[name]).parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert real[: len(positional)] == positional and set(mine) <= set(real)


@pytest.mark.parametrize("mask", MASKS)
def test_flex_blocks_and_elements(mask: str) -> None:
    """Filled blocks are wholly allowed, and partial ones are allowed where their bitmaps say."""
    bands = tuple(Band._make(12 * x for x in band) for band in MASKS[mask].bands)
    blocks = blocks_of(cut(bands, (0, 444), (0, 440)), 444, 440)
    assert blocks.filled.shape == (4, 4)
    assert not (blocks.filled & blocks.partial).any()
    allowed = torch.zeros(512, 512, dtype=torch.bool)
    allowed[:444, :440] = torch.from_numpy(dense(cut(bands, (0, 444), (0, 440)), 444, 440))
    q, k, none = torch.arange(512)[:, None], torch.arange(512)[None, :], torch.zeros(1)
    bitmaps = torch.from_numpy(np.concatenate([blocks.bitmaps, np.zeros((1, BLOCK, BLOCK), bool)]))
    got = element_mask(torch.from_numpy(blocks.bitmap_of), bitmaps)(none, none, q, k)
    by_block = [torch.from_numpy(x).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) for x in blocks[:2]]
    assert torch.equal((got & by_block[0]) | by_block[1], allowed)


def test_flex_fills_whole_blocks_and_keeps_each_bitmap_once() -> None:
    blocks = blocks_of(masks.causal(512).bands, 512, 512)
    assert blocks.partial.sum() == 4 and blocks.filled.sum() == 6
    assert len(blocks.bitmaps) == 1  # the diagonal looks alike everywhere


@pytest.mark.parametrize("mask", ["causal", "documents", "prefix"])
def test_flex_lists_blocks_as_torch_does_also_under_a_selective_checkpoint(mask: str) -> None:
    bands, made = tuple(Band._make(12 * x for x in band) for band in MASKS[mask].bands), []

    @torch.library.custom_op("longspan_test::lists_blocks", mutates_args=())
    def operator(x: Tensor) -> Tensor:
        made.append(_block_mask.__wrapped__(cut(bands, (0, 444), (0, 440)), 444, 440, x.device))
        return x.clone()

    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.longspan_test.lists_blocks.default])
    checkpoint(operator, torch.ones(1, requires_grad=True), use_reentrant=False, context_fn=contexts)
    (got,) = made
    want = BlockMask.from_kv_blocks(
        got.kv_num_blocks, got.kv_indices, got.full_kv_num_blocks, got.full_kv_indices, BLOCK, got.mask_mod,
        (444, 440),
    )  # fmt: skip
    assert got.seq_lengths == want.seq_lengths and got.shape == want.shape
    for kind in ("", "full_"):
        counts = getattr(got, f"{kind}q_num_blocks")
        assert torch.equal(counts, getattr(want, f"{kind}q_num_blocks"))
        assert counts.any() or kind
        for column, count in enumerate(counts[0, 0].tolist()):  # what comes after is never read
            lists = (getattr(x, f"{kind}q_indices")[0, 0, column, :count] for x in (got, want))
            assert torch.equal(*lists)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_gradient_of_the_whole_row_from_local_results(softcap: float | None) -> None:
    bands, num_q, num_k = block("documents", "square")
    q, k, v, dout = tensors(num_q, num_k, 2, 2)
    truth = oracle(q, k, v, dout, bands, scale=0.3, softcap=softcap)
    lse, delta = torch.from_numpy(truth.lse), torch.from_numpy(truth.delta)
    allowed = torch.from_numpy(dense(bands, num_q, num_k))
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for keys in (slice(0, 9), slice(9, 37)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        scores = torch.einsum("bqhd,bkhd->bhqk", leaves[0], leaves[1][:, keys]) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = torch.exp(scores) * allowed[:, keys]
        total = weights.sum(-1)
        some = total > 0
        local_lse = torch.where(some, total.clamp_min(1e-30).log(), -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", weights / total.clamp_min(1e-30).unsqueeze(-1), leaves[2][:, keys])
        through_out, through_lse = local_cotangents(dout, out, local_lse, lse, delta)
        assert (through_lse[~some] == 0).all()
        finite = local_lse.masked_fill(~some, 0)
        for x, new in zip(sums, torch.autograd.grad((out, finite), leaves, (through_out, through_lse)), strict=True):
            x += new
    for x, y in zip(sums, (truth.dq, truth.dk, truth.dv), strict=True):
        torch.testing.assert_close(x, torch.from_numpy(y), rtol=0, atol=2e-6)  # the cotangents are float32


def test_reference_takes_what_the_others_do_not() -> None:
    q = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    assert Reference().supports(q, q, q, softcap=1.0) is None


def flash_window(num_q: int, num_k: int, left: int, right: int) -> np.ndarray:
    """What FlashAttention-2 does with a window: sides of num_k or more are "all", one open side counts as num_k."""
    left, right = (-1 if side >= num_k else side for side in (left, right))
    if left < 0 and right < 0:
        return np.ones((num_q, num_k), dtype=bool)
    left, right = (num_k if side < 0 else side for side in (left, right))
    diagonal = np.arange(num_k)[None, :] - np.arange(num_q)[:, None] - (num_k - num_q)
    return (diagonal >= -left) & (diagonal <= right)


def test_every_band_survives_the_windows_of_flash_attention() -> None:
    size = 7
    for num_q, num_k, lo, hi in itertools.product(
        range(1, size), range(1, size), range(-size, size), range(-size, size)
    ):
        band = tighten(Band(0, num_q, 0, num_k, lo, hi))
        if band is None:
            continue
        got = np.zeros((num_q, num_k), dtype=bool)
        for call in plan_windows((band,)):
            sides = {"full": (-1, -1), "causal": (-1, 0)}.get(call.kind) or window(call)
            rows, columns = slice(call.q0, call.q1), slice(call.k0, call.k1)
            got[rows, columns] |= flash_window(call.q1 - call.q0, call.k1 - call.k0, *sides)
        np.testing.assert_array_equal(got, dense((band,), num_q, num_k))
