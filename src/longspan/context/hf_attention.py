"""Stock Hugging Face decoders on a split sequence, by transformers' attention and mask interfaces (transformers >= 5).

    split = attach(model, group)                   # once
    local = shard_batch(batch, split)              # every step: the whole batch in, this rank's tokens out
    loss = model(**local).loss                     # summed over the ranks it is the unsplit model's loss

``attach`` registers longspan with transformers under the name "longspan", so ``attn_implementation="longspan"`` works
too, and puts the split on the model's own attention layers: that is where the attention function finds it. A variable
scoped by ``with`` would be gone in the backward pass, in which gradient checkpointing calls the layers again (on CUDA
in another thread), and a process-wide one would mix up two models.

Losses and gradients are sums over the ranks, not means: reduce gradients with SUM (DDP and FSDP2 divide by the world).
Verified equal to the unsplit model: Llama, Qwen3, Mistral. Other decoders of the interface are taken as well, if
nothing below refuses them.

Refused by name: padding and 4D masks, attention dropout, a key-value cache, attention weights as output, soft prompts,
sinks and biases, chunked, bidirectional and cross attention, mixers that are not attention (their state would stop at
the end of a shard), and auxiliary router losses (their mean over a shard's tokens is not a sum over ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.attention.masks import Mask, documents
from longspan.context.attend import group_in_force
from longspan.context.exchange import agree
from longspan.context.sequence import SequenceContext
from longspan.layout.tokens import Layout

NAME = "longspan"
IGNORED = -100  # the label that transformers' losses skip

_LAYERS = frozenset({"full_attention", "sliding_attention"})
_ALONG_TOKENS = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask")
# What a model hands down to its attention layers and does not concern them.
_PASSING = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
_ATTRIBUTE = "_longspan_split"


class Split:
    """How a model's sequences are split: what ``attach`` puts on its attention layers.

    ``context`` is the ``SequenceContext`` in force, renewed by every ``shard_batch``; the backward pass of one batch
    must be over before the next batch is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None,
        method: str,
        layout: Layout | str | None,
        kernel: str,
        device: torch.device | str | None,
    ) -> None:
        self.group, self.method, self.layout, self.kernel = group_in_force(group), method, layout, kernel
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        self.has_causal_loss = getattr(model, "loss_type", None) == "ForCausalLM"
        self.context: SequenceContext | None = None
        self.position_ids: Tensor | None = None  # int64 (1, l): what the model must have turned its queries by

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        """A copy of the model (an average of weights, say) splits its sequences the same way."""
        return self

    def renew(self, mask: Mask, positions: np.ndarray) -> SequenceContext:
        """Take the next batch's mask and position ids (int64 (s,)). Collective once the model has run."""
        if self.context is None:
            self.context = SequenceContext(
                mask,
                self.group,
                method=self.method,
                layout=self.layout,
                positions=positions,
                device=self.device,
                kernel=self.kernel,
            )
        else:
            self.context.renew(mask, positions)
        self.position_ids = self.context.positions[None]
        return self.context


def register() -> None:
    """Make ``attn_implementation="longspan"`` known to transformers; ``attach`` does so too. Harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    # Without a mask function of the same name transformers drops a padding mask without a word.
    AttentionMaskInterface.register(NAME, mask_function)


def attach(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    method: str = "auto",
    layout: Layout | str | None = None,
    kernel: str = "auto",
    device: torch.device | str | None = None,
) -> Split:
    """Let a transformers model run on sequences split over ``group``; the model keeps its parameters and its class.

    Args: ``method``, ``layout`` and ``kernel`` as in ``longspan.context.attention`` (a ``Layout`` fits one length
    only); ``device`` of the batches, by default that of the model's first parameter.
    Raises ValueError for a model whose token mixing longspan does not do; each reason names its remedy.
    """
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise ValueError(
            f"attach needs a model of transformers, got {type(model).__name__}; a model of yours calls "
            "longspan.context.attention in its layers"
        )
    layers = [module for module in model.modules() if hasattr(module, "is_causal")]
    _refuse_model(model, layers)
    register()
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    if model.config._attn_implementation != NAME:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"{type(model).__name__} must take its attention from transformers' attention interface, and does not; use "
            "a class of transformers that does, or import the checkpoint with longspan.model.load_pretrained"
        )
    split = Split(model, group, method, layout, kernel, device)
    for layer in layers:
        setattr(layer, _ATTRIBUTE, split)
    return split


def _refuse_model(model: nn.Module, layers: list[nn.Module]) -> None:
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
    """Called by transformers once a forward pass for each kind of layer: refuses all that is no causal band.

    Returns what the layers are handed: None for full attention, and for a window an empty tensor of ``window`` rows
    (some layers do not know their window; the mask of the documents is the split's own, over the whole sequence).
    """
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
    chunk = getattr(options.get("config"), "attention_chunk_size", None)
    if use_vmap or (chunk is not None and chunk == local_size) or _sees_ahead(mask_function, q_length, device):
        raise ValueError(
            "the model's own mask must be causal, full or with a window, and it has an overlay, chunks or tokens that "
            "look ahead; pass such a mask to shard_batch as mask=, and use a model class without it"
        )
    return None if local_size is None else torch.empty((local_size, 0), dtype=torch.bool, device=device)


def _sees_ahead(function: Callable[..., Tensor] | None, length: int, device: torch.device | str) -> bool:
    """Whether some token may attend to the one after it."""
    if function is None or length < 2 or torch.compiler.is_compiling():
        return False
    zero = torch.zeros((), dtype=torch.int64, device=device)
    query = torch.arange(length - 1, device=device)
    return bool(torch.as_tensor(function(zero, zero, query, query + 1)).any())


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b g l d"],
    value: Float[Tensor, "b g l d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b l h d"], None]:
    """Called by transformers in every attention layer: the split's attention, or a refusal by name."""
    split: Split | None = getattr(module, _ATTRIBUTE, None)
    if split is None or split.context is None or split.position_ids is None:
        rule = "attach(model, group)" if split is None else "shard_batch(batch, split)"
        raise ValueError(
            f"attn_implementation={NAME!r} needs a split sequence, and there is none yet; call {rule} first"
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0, got {dropout}; set config.attention_dropout = 0.0")
    if options.pop("is_causal", True) is False:
        raise ValueError("is_causal must be True, got False; pass another mask to shard_batch as mask=")
    for name, given in options.items():
        if name not in _PASSING and given is not None and given is not False:
            raise ValueError(f"{name} must not reach a split attention layer, got {_said(given)}; leave it out")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"queries and keys must be the same local tokens, got {query.shape[2]} and {key.shape[2]}: a split "
            "sequence has no key-value cache; pass use_cache=False, and generate with an unsplit model"
        )
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] != 0):
        raise ValueError(
            f"attention_mask must not be a tensor of {tuple(attention_mask.shape)} on a split sequence; leave it out "
            "and pass the mask of the whole sequence to shard_batch as mask="
        )
    window = None if attention_mask is None else attention_mask.shape[0]
    if sliding_window is not None and sliding_window != window:
        raise ValueError(
            f"a layer's sliding_window and its mask must agree, got {sliding_window} and "
            f"{'no window' if window is None else window} in {type(module).__name__}; set layer_types or "
            "sliding_window in the config"
        )
    _check_positions(options.get("position_ids"), split.position_ids)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which torch's own attention obeys
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer = getattr(module, "layer_idx", None) or 0
    return split.context.attend(q, k, v, layer=layer, window=window, scale=scaling, softcap=softcap), None


def _check_positions(given: Tensor | None, expected: Tensor) -> None:
    """Refuses position ids that are not the shard's: left out, a model would count each shard from 0."""
    if given is None or torch.compiler.is_compiling() or given.data_ptr() == expected.data_ptr():
        return
    if given.shape[-1] != expected.shape[-1] or not torch.equal(given.to(expected), expected.expand_as(given)):
        raise ValueError(
            f"position_ids must be those of this rank's {expected.shape[-1]} tokens in the whole sequence, got others "
            f"({given.shape[-1]}); call the model with all that shard_batch returned"
        )


def _said(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def shard_batch(batch: Mapping[str, Any], split: Split, mask: Mask | None = None) -> dict[str, Any]:
    """This rank's share of a batch that every rank of the group holds whole. Collective: ranks compare their batches.

    Args: ``batch`` holds input_ids (or inputs_embeds (b, s, c)), and may hold labels, position_ids and an
    attention_mask of ones, (b, s) each; ``mask`` of the whole sequence, by default causal, and causal within documents
    where position_ids restart (with any step but +1, transformers' own rule).
    Returns keyword arguments of the model, on its device: input_ids (b, l), position_ids (1, l), use_cache=False, and
    with labels: shift_labels (b, l), shifted before the split so that no target is lost at a seam; labels, the same,
    which transformers wants beside them; num_items_in_batch, the targets of all ranks (one given in ``batch``, for
    several batches to a step, is kept).
    Raises ValueError where the ranks' batches differ, and for padding, rows whose documents differ, or unknown keys.
    """
    group, device = split.group, split.device
    if group is not None and dist.get_world_size(group) > 1:
        agree(group, _digest(batch), "batch (the whole of it; only shard_batch splits it)", device)
    given = {name: value for name, value in batch.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None or tokens.ndim < 2 or ("input_ids" in given and "inputs_embeds" in given):
        raise ValueError(
            "a batch must have input_ids (b, s) or inputs_embeds (b, s, c), and not both, got "
            f"{', '.join(f'{name}: {_said(value)}' for name, value in given.items()) or 'nothing'}"
        )
    _refuse_batch(given, split, tokens.shape[:2])
    num_tokens = int(tokens.shape[1])
    if "attention_mask" in given and not bool((given["attention_mask"] == 1).all()):
        mask_function(len(tokens), num_tokens, num_tokens, attention_mask=given["attention_mask"] == 1)
    positions = _positions(given.get("position_ids"), num_tokens)
    if mask is None:
        lengths = _lengths(positions)
        if len(lengths) > 1 and "attention_mask" in given:
            raise ValueError(
                "transformers sees documents in position_ids only where there is no attention_mask, got both; leave "
                "attention_mask out, or say which mask is meant with mask="
            )
        mask = documents(lengths)
    elif mask.num_tokens != num_tokens:
        raise ValueError(f"mask must be of the batch's {num_tokens} tokens, got one of {mask.num_tokens}")
    context = split.renew(mask, positions)
    if not min(context.layout.local_sizes):
        raise ValueError(f"each of {context.world} ranks needs a token, got {num_tokens}; use fewer ranks or pack rows")
    local: dict[str, Any] = {
        name: context.local(given[name]).to(device) for name in ("input_ids", "inputs_embeds") if name in given
    }
    local |= {"position_ids": split.position_ids, "use_cache": False}
    targets = given.get("shift_labels")
    if targets is None and "labels" in given:
        targets = F.pad(given["labels"], (0, 1), value=IGNORED)[:, 1:]
    if targets is not None:
        local["labels"] = local["shift_labels"] = context.local(targets).to(device)
        total = given.get("num_items_in_batch", (targets != IGNORED).sum())
        local["num_items_in_batch"] = torch.as_tensor(total, device=device)
    return local


def _refuse_batch(given: Mapping[str, Any], split: Split, shape: torch.Size) -> None:
    unknown = sorted(given.keys() - {*_ALONG_TOKENS, "num_items_in_batch", "use_cache"})
    if unknown:
        raise ValueError(
            f"a batch may hold {', '.join(_ALONG_TOKENS)} and num_items_in_batch, got {', '.join(unknown)} as well; "
            "leave these out (documents are told by position_ids)"
        )
    if given.get("use_cache"):
        raise ValueError("use_cache must be False, got True: a split sequence has no key-value cache; leave it out")
    for name in _ALONG_TOKENS:
        if name in given and given[name].shape[:2] != shape and name != "position_ids":
            raise ValueError(f"{name} must be {tuple(shape)} as the tokens are, got {tuple(given[name].shape)}")
    if ("labels" in given or "shift_labels" in given) and not split.has_causal_loss:
        raise ValueError(
            "labels need a model with the causal language model's loss (a ...ForCausalLM class), which alone takes "
            "shift_labels; leave labels out and compute the loss on local tokens"
        )


def _positions(given: Tensor | None, num_tokens: int) -> np.ndarray:
    """int64 (s,): one row of position ids for all rows of the batch."""
    if given is None:
        return np.arange(num_tokens)
    rows = given.reshape(-1, given.shape[-1]).cpu()
    if given.ndim > 2 or rows.shape[1] != num_tokens:
        raise ValueError(f"position_ids must be (b, {num_tokens}) or (1, {num_tokens}), got {tuple(given.shape)}")
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise ValueError(
            "all rows of a batch must have the same position_ids, got rows that differ: one mask holds for all of "
            "them; pack the rows into one, with position_ids that restart"
        )
    return rows[0].numpy().astype(np.int64)


def _lengths(positions: np.ndarray) -> list[int]:
    """Tokens of each document: one starts where position ids do not go on by one."""
    edges = np.flatnonzero(np.diff(positions) != 1) + 1
    return np.diff([0, *edges.tolist(), len(positions)]).tolist()


def _digest(batch: Mapping[str, Any]) -> str:
    """Of the integer tensors and of all shapes: embeddings may differ by rounding between machines."""
    digest = blake2b(digest_size=8)
    for name in sorted(batch):
        value = batch[name]
        digest.update(f"{name} {_said(value)}".encode())
        if isinstance(value, Tensor) and not value.is_floating_point():
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
