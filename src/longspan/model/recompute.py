"""Activation checkpointing of a model's blocks, applied from outside the model.

"none" keeps every activation. "full" keeps each block's input and runs the whole block again in the backward: least
memory, about a third more compute. "attention" is the placement of LightSeq / DistFlashAttn (Li et al., 2023,
arXiv:2310.03294, section 3.4): as "full", but the output and log-sum-exp of attention are kept too, so that the
backward never runs attention forward again. On a long sequence attention is nearly all of the work, and on a split one
its second run would repeat the communication. The paper moves the checkpoint boundary to attention's output to get
there; here a selective policy marks the operators whose outputs are kept and everything else is recomputed, with the
same effect.

Per block, with x = b·l·dim elements: "full" keeps x, "attention" keeps x, b·l·h·d of output and b·h·l of lse. With
`offload`, these go to host memory: see `model.offload`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from longspan.model.offload import NUM_ON_DEVICE, ActivationOffload, Group

Recompute = Literal["none", "full", "attention"]

# What F.scaled_dot_product_attention becomes on each device; its plain "math" form is not one operator and is not here.
SDPA_OPS: tuple[OpOverload, ...] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def apply_recompute(
    model: nn.Module,
    mode: Recompute,
    *,
    keep_ops: Sequence[OpOverload] = SDPA_OPS,
    offload: ActivationOffload | None = None,
) -> None:
    """Sets how the blocks of `model` (its `blocks`) are recomputed in the backward; calling again replaces the mode.

    Parameter names and modules stay as they are: only each block's `forward` is wrapped, inside any hook on the block,
    so call this before `fully_shard`.

    Args:
        model: has `blocks`, the modules to recompute.
        mode: "none", "full" or "attention".
        keep_ops: for "attention", the operators whose outputs are kept.
        offload: moves what is kept to host memory. Not for torch.compile.

    Raises:
        ValueError: an unknown mode, a model without blocks, "attention" with no operator to keep, or offload with
            "none", which keeps every activation; and, in the forward, a block that ran none of `keep_ops`, whose
            attention would silently be computed twice.
    """
    check_recompute(mode)
    blocks = getattr(model, "blocks", None)
    if not blocks:
        raise ValueError(f"recompute needs a model with blocks, got {type(model).__name__}; pass the decoder itself")
    if mode == "attention" and not keep_ops:
        raise ValueError('recompute "attention" needs operators to keep, got none; pass keep_ops or use "full"')
    if mode == "none" and offload is not None:
        raise ValueError('offload needs recompute "full" or "attention", got "none", which keeps every activation')
    found = list(blocks)
    for index, block in enumerate(found):
        _unwrap(block)
        if offload is not None:
            stays = index >= len(found) - NUM_ON_DEVICE
            kept = tuple(keep_ops) if mode == "attention" else ()
            block.forward = partial(_checkpoint_moving, block.forward, kept, offload, stays)
        elif mode == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif mode == "attention":
            block.forward = partial(_checkpoint_keeping, block.forward, tuple(keep_ops))


def check_recompute(mode: str) -> None:
    """Raises the one-line ValueError unless `mode` is a known way of recomputing."""
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {mode!r}")


def _unwrap(block: nn.Module) -> None:
    wrapped = block.__dict__.get("forward")
    if isinstance(wrapped, partial) and wrapped.func in (checkpoint, _checkpoint_keeping, _checkpoint_moving):
        inner = wrapped.args[0]
        del block.forward
        # A forward that somebody else had set on the instance stays theirs.
        if getattr(inner, "__func__", inner) is not type(block).forward:
            block.forward = inner


def _checkpoint_keeping(
    forward: Callable[..., Any], keep_ops: tuple[OpOverload, ...], *args: Any, **kwargs: Any
) -> Any:
    seen: list[OpOverload] = []
    contexts = partial(_keeping, keep_ops, seen)
    out = checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    # Without gradients the policy is never asked; a compiler asks it later.
    if not seen and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _refuse_keeping_nothing(keep_ops)
    return out


def _refuse_keeping_nothing(keep_ops: tuple[OpOverload, ...]) -> NoReturn:
    names = ", ".join(str(op) for op in keep_ops)
    raise ValueError(
        f'recompute "attention" kept nothing: the block ran none of {names}; pass its operator in keep_ops'
    )


def _keeping(keep_ops: tuple[OpOverload, ...], seen: list[OpOverload]) -> Any:
    """The pair of contexts (forward, recomputation) of one call of one block; `seen` collects the operators kept."""

    def policy(_ctx: Any, op: OpOverload, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if op not in keep_ops:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


def _checkpoint_moving(
    forward: Callable[..., Any],
    keep_ops: tuple[OpOverload, ...],
    offload: ActivationOffload,
    stays: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    group = offload.begin(stays=stays)
    keep = _Keep(group, keep_ops)
    contexts = (lambda: (keep, _Reuse(keep))) if keep_ops else noop_context_fn
    with group.hooks():
        out = checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    offload.end(group)
    if keep_ops and not keep.outputs:
        _refuse_keeping_nothing(keep_ops)
    return out


class _Keep(TorchDispatchMode):
    """Torch's selective checkpoint keeps outputs past the hooks of saved tensors: this one keeps them by a group."""

    def __init__(self, group: Group, keep_ops: tuple[OpOverload, ...]) -> None:
        super().__init__()
        self.group, self.keep_ops, self.outputs = group, keep_ops, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.keep_ops:
            kept = [self.group.keep(x.detach()) if isinstance(x, Tensor) else x for x in _as_tuple(out)]
            self.outputs.append((isinstance(out, Tensor), kept))
        return out


class _Reuse(TorchDispatchMode):
    """The recomputation: an operator whose outputs were kept is not run, each once and in order."""

    def __init__(self, keep: _Keep) -> None:
        super().__init__()
        self.keep, self.next = keep, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.keep.keep_ops:
            return func(*args, **(kwargs or {}))
        if self.next == len(self.keep.outputs):
            raise RuntimeError(
                "a block's kept attention is gone after one backward; drop retain_graph=True, or use recompute full"
            )
        single, kept = self.keep.outputs[self.next]
        self.keep.outputs[self.next] = None  # the last that holds it
        self.next += 1
        out = tuple(self.keep.group.get(x) if isinstance(x, tuple) else x for x in kept)
        return out[0] if single else out


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
