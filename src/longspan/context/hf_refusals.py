"""Which models and masks of transformers cannot run on a split sequence: refused by name and with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label that transformers' losses skip
_WHY = "longspan_refusal"
_LAYERS = frozenset({"full_attention", "sliding_attention"})


def refuse_model(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raises ValueError where tokens of ``model`` meet elsewhere than in its causal attention ``layers``."""
    name, config = type(model).__name__, model.config
    configs = [config, *(getattr(layer, "config", config) for layer in layers)]
    if not layers:
        raise ValueError(f"{name} must have causal attention layers, and has none; longspan splits attention only")
    if any(getattr(each, "is_encoder_decoder", False) for each in configs) or not all(m.is_causal for m in layers):
        raise ValueError(
            f"every attention layer must be causal self-attention, and {name} has others (an encoder, a vision tower, "
            "cross-attention); attach to its language model alone"
        )
    kinds = {str(kind) for each in configs for kind in getattr(each, "layer_types", None) or ()}
    if kinds - _LAYERS:
        raise ValueError(
            f"layer_types must be of {sorted(_LAYERS)}, got {sorted(kinds - _LAYERS)} in {name}: longspan's schedules "
            "do not carry such a layer from one rank to the next; use a model without it"
        )
    if getattr(model, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise ValueError(
            f"tokens must meet in attention only, and {name} has a state or a convolution along the sequence, which "
            "would stop at the end of a shard; use a model without it"
        )
    if any(getattr(each, "attention_chunk_size", None) for each in configs):
        raise ValueError(f"attention_chunk_size must be None, got one in {name}; use full attention or sliding windows")
    if any(getattr(each, "output_router_logits", False) for each in configs):
        raise ValueError(
            f"output_router_logits must be False, got True in {name}: the auxiliary loss of a shard's tokens is no "
            "part of a sum over ranks; set config.output_router_logits = False"
        )


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Called by transformers once a forward pass for each kind of layer, to make what its layers are handed.

    Returns None for full attention, and for a window an empty tensor of ``window`` rows (some layers do not know their
    window; the mask of the documents is the split's own, over the whole sequence). What is no causal band is refused by
    the first layer that is handed it, where the other ranks are told (`refusal`): for it a tensor of no rows at all.
    """
    chunk = getattr(options.get("config"), "attention_chunk_size", None)
    own = use_vmap or (chunk is not None and chunk == local_size) or _sees_ahead(mask_function, q_length, device)
    try:
        refuse_mask(q_length, kv_length, attention_mask, own=own)
    except ValueError as error:
        refused = torch.empty((0, 0), dtype=torch.bool, device=device)
        setattr(refused, _WHY, str(error))
        return refused
    return None if local_size is None else torch.empty((local_size, 0), dtype=torch.bool, device=device)


def refusal(attention_mask: Tensor | None) -> str | None:
    """Why the mask function refused the mask of a layer that is handed ``attention_mask``; None where it did not."""
    if attention_mask is None or tuple(attention_mask.shape) != (0, 0):
        return None
    # A copy of what the mask function returned, as a checkpoint may make it, has lost the words.
    unsaid = (
        "the model's mask must be causal, full or with a window, and it is not; leave attention_mask out, or pass the "
        "mask to shard_batch as mask="
    )
    return getattr(attention_mask, _WHY, unsaid)


def refuse_mask(q_length: int, kv_length: int, attention_mask: Tensor | None, *, own: bool = False) -> None:
    """Raises ValueError for padding, for keys that are not the queries' tokens, and where a model has a mask of its
    ``own``."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask must be all ones on a split sequence, got zeros; pack rows as documents (position_ids that "
            "restart, as DataCollatorWithFlattening makes them), or, where padding comes last and its labels are "
            f"{IGNORED}, leave attention_mask out: a causal token never sees what comes after it"
        )
    if q_length != kv_length:
        raise ValueError(
            f"queries and keys must be the same local tokens, got {q_length} and {kv_length}: a split sequence has no "
            "key-value cache and no prefix; pass use_cache=False, and generate with an unsplit model"
        )
    if own:
        raise ValueError(
            "the model's own mask must be causal, full or with a window, and it has an overlay, chunks or tokens that "
            "look ahead; pass such a mask to shard_batch as mask=, and use a model class without it"
        )


def _sees_ahead(function: Callable[..., Tensor] | None, length: int, device: torch.device | str) -> bool:
    """Whether some token may attend to the one after it."""
    if function is None or length < 2 or torch.compiler.is_compiling():
        return False
    zero = torch.zeros((), dtype=torch.int64, device=device)
    query = torch.arange(length - 1, device=device)
    return bool(torch.as_tensor(function(zero, zero, query, query + 1)).any())
