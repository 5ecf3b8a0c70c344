"""``torch.ops.longspan.attention`` as torch sees it: opcheck, compile, rebinding, checkpointing, FLOPs, derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.flop_counter import FlopCounterMode

from longspan.attention import masks
from longspan.attention.masks import Mask
from longspan.context import attend, prepare, run
from longspan.context.build import build
from longspan.context.run import Bound, bind, rebind, release
from tests.context.cases import MASKS, inputs
from tests.oracles.attention import dense_attention

S, H, G, D = 11, 4, 2, 8
OP = torch.ops.longspan.attention


def _handle(mask: Mask, h: int = H, g: int = G, softcap: float | None = None) -> int:
    """A handle of one's own, unlike ``prepare``'s, which equal arguments share: these tests rebind it."""
    built = build(mask, world=1, rank=0, num_heads=h, num_kv_heads=g)
    return bind(Bound(built, None, None, softcap, "auto"))


def _leaves(s: int = S, h: int = H, g: int = G, d: int = D, b: int = 2, dtype: torch.dtype = torch.float64):
    q, k, v, dout = inputs(s, h, g, d=d, b=b, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v)], dout


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mask", ["causal", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(mask: str, dtype: torch.dtype) -> None:
    handle = _handle(MASKS[mask](S))
    leaves, dout = _leaves(dtype=dtype)
    torch.library.opcheck(OP, (*leaves, handle))
    out, lse, saved = OP(*leaves, handle)
    delta = (dout * out).sum(-1).transpose(1, 2).to(lse.dtype).contiguous()
    grads, stats = [x.detach() for x in (dout, *leaves)], [x.detach() for x in (lse, delta, saved)]
    for own in (out.detach(), None):
        torch.library.opcheck(torch.ops.longspan.attention_backward, (*grads, own, *stats, handle))
    release(handle)


def _attend(tensors: Sequence[torch.Tensor], handle: int) -> torch.Tensor:
    q, k, v = tensors
    return attend(q, k, v, handle)


def _block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, handle: int) -> torch.Tensor:
    """Something around the attention for a compiler to look at."""
    return attend(torch.sin(q) * 2, k + 1, v, handle).square()


def _check_compiled(backend: str) -> None:
    handle = _handle(masks.causal(S))
    compiled = torch.compile(_block, fullgraph=True, backend=backend)
    for mask in (masks.causal(S), masks.sliding_window(S, 2, 1), masks.full(S)):
        rebind(handle, build(mask, world=1, rank=0, num_heads=H, num_kv_heads=G))
        found = []
        for function in (_block, compiled):
            leaves, dout = _leaves()
            q, k, v = leaves
            out = function(q, k, v, handle)
            out.backward(dout)
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for eager, mine in zip(*found, strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=1e-12)
        q, k, v = (x.detach() for x in (q, k, v))
        expected = dense_attention(torch.sin(q) * 2, k + 1, v, dout, mask.dense().numpy()).out ** 2
        np.testing.assert_allclose(found[1][0].numpy(), expected, rtol=0, atol=1e-11)
    # One graph, never made anew: the mask is behind the handle.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]
    release(handle)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_backward_without_a_gradient_of_lse_takes_the_output_itself(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = _handle(masks.causal(S))
    given: list[torch.Tensor | None] = []

    class Noting(run.Worker):
        def __init__(self, *args: Any) -> None:
            given.append(args[4])
            super().__init__(*args)

    monkeypatch.setattr(run, "Worker", Noting)
    function = _block if backend is None else torch.compile(_block, fullgraph=True, backend=backend)
    leaves, dout = _leaves()
    q, k, v = leaves
    function(q, k, v, handle).backward(dout)
    assert [out is None for out in given] == [True, False], "the forward has none, the backward has it"
    given.clear()
    leaves, dout = _leaves()
    out, lse, _ = OP(*leaves, handle)
    (out.sum() + lse.sum()).backward()
    assert [out is None for out in given] == [True, True]
    release(handle)


def test_compile_without_recompiling_for_another_mask() -> None:
    _check_compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own, of torch.jit
def test_compile_with_inductor() -> None:
    _check_compiled("inductor")


class _Count(TorchDispatchMode):
    """How often each of our ops ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"attention": 0, "attention_backward": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("longspan.").removesuffix(".default")
        if name in self.calls:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == OP.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("keep", "num_forward"), [(True, 1), (False, 2)])
def test_selective_checkpointing_keeps_the_output(keep: bool, num_forward: int) -> None:
    handle = _handle(masks.causal(S))
    plain, dout = _leaves()
    _block(*plain, handle=handle).backward(dout)
    leaves, _ = _leaves()
    context = partial(create_selective_checkpoint_contexts, _policy) if keep else noop_context_fn
    with _Count() as count:
        checkpoint(_block, *leaves, handle, use_reentrant=False, context_fn=context).backward(dout)
    assert count.calls == {"attention": num_forward, "attention_backward": 1}
    for mine, expected in zip(leaves, plain, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=0, atol=0)
    release(handle)


@pytest.mark.parametrize("mask", MASKS)
def test_flops_are_those_of_the_allowed_pairs(mask: str) -> None:
    chosen = MASKS[mask](23)
    handle = _handle(chosen)
    leaves, dout = _leaves(s=23, b=3)
    with FlopCounterMode(display=False) as forward:
        out = _attend(leaves, handle)
    with FlopCounterMode(display=False) as backward:
        out.backward(dout)
    pairs = int(chosen.dense().sum()) * H
    assert forward.get_total_flops() == 4 * pairs * D * 3
    assert backward.get_total_flops() == 10 * pairs * D * 3
    release(handle)


def test_second_derivatives_are_refused() -> None:
    handle = _handle(masks.causal(S))
    leaves, dout = _leaves()
    (dq,) = torch.autograd.grad(_attend(leaves, handle), leaves[:1], dout, create_graph=True)
    with pytest.raises(ValueError, match="second derivatives of longspan attention are not supported") as caught:
        dq.sum().backward()
    assert "\n" not in str(caught.value)
    release(handle)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", ["causal", "window", "holes"])
def test_gradients_through_out_and_lse_are_exact(mask: str, softcap: float | None) -> None:
    chosen = MASKS[mask](7)
    handle = _handle(chosen, 3, 1, softcap)
    leaves, _ = _leaves(s=7, h=3, g=1, d=2, b=1)
    seen = chosen.dense().any(1)

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = OP(q, k, v, handle)
        return out, lse[..., seen]  # -inf has no difference quotient

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(lambda *x: both(*x)[1], leaves)
    release(handle)


def test_unused_outputs_and_frozen_inputs() -> None:
    handle = _handle(masks.causal(S))
    (q, k, v), dout = _leaves()
    (dk,) = torch.autograd.grad(attend(q.detach(), k, v.detach(), handle), [k], dout)
    expected = dense_attention(q.detach(), k.detach(), v.detach(), dout, masks.causal(S).dense().numpy())
    np.testing.assert_allclose(dk.numpy(), expected.dk, rtol=0, atol=1e-11)
    assert not attend(q.detach(), k.detach(), v.detach(), handle).requires_grad
    release(handle)


def test_inputs_of_any_strides() -> None:
    handle = _handle(masks.causal(S))
    packed = torch.randn(2, S, D, H + 2 * G, dtype=torch.float64).transpose(2, 3)
    q, k, v = packed.split([H, G, G], dim=2)
    got = attend(q, k, v, handle)
    expected = dense_attention(q, k, v, q, masks.causal(S).dense().numpy()).out
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
    assert got.is_contiguous()
    release(handle)


def test_prepared_handles_work_in_a_compiled_function() -> None:
    handle = prepare(masks.causal(S), num_heads=H, num_kv_heads=G)
    leaves, _ = _leaves()
    compiled = torch.compile(lambda x: _attend(x, handle), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(leaves), _attend(leaves, handle))
