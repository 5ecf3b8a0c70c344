"""Stock Hugging Face decoders on a split sequence, by transformers' attention and mask interfaces (transformers >= 5).

    split = attach(model, group)                   # once
    local = shard_batch(batch, split)              # every step: the whole batch in, this rank's tokens out
    loss = model(**local).loss                     # summed over the ranks it is the unsplit model's loss

``attach`` registers longspan with transformers under the name "longspan", so ``attn_implementation="longspan"`` works
too, and puts the split on the model's own attention layers: that is where the attention function finds it. A variable
scoped by ``with`` would be gone in the backward pass, in which gradient checkpointing calls the layers again (on CUDA
in another thread), and a process-wide one would mix up two models.

Transformers makes position ids itself where a call has none, 0, 1, ... on every rank: wrong on all but the first. So
the layers compare those they are handed with the shard's. At the first layer after ``shard_batch`` the ranks say to
each other whether their call fits, so that one that does not stops all of them; a later call on the same batch is
judged by each rank alone, and nothing is compared inside a compiled region: pass on all that ``shard_batch`` returned.

Losses and gradients are sums over the ranks, not means: reduce gradients with SUM (DDP and FSDP2 divide by the world).
Verified equal to the unsplit model: Llama, Qwen3, Mistral. Other decoders of the interface are taken as well, if
nothing below refuses them.

Refused by name: padding and 4D masks, attention dropout, a key-value cache, attention weights as output, soft prompts,
sinks and biases, chunked, bidirectional and cross attention, mixers that are not attention (their state would stop at
the end of a shard), and auxiliary router losses (their mean over a shard's tokens is not a sum over ranks).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
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
from longspan.context.hf_refusals import IGNORED, mask_function, refusal, refuse_mask, refuse_model
from longspan.context.sequence import SequenceContext
from longspan.layout.tokens import Layout

NAME = "longspan"

_ALONG_TOKENS = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask")
# What a model hands down to its attention layers and does not concern them.
_PASSING = frozenset(
    {
        "cache_position",
        "is_causal",
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
        self._has_met = False

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
        self._has_met = False
        return self.context

    def meet(self, *, fits: bool) -> None:
        """Before a batch's first exchange: raises ValueError where the model's call fits on some ranks only.

        Collective once a batch, at its first layer: a rank that is refused there would leave the others waiting.
        """
        if self._has_met or self.context is None or self.context.world == 1 or torch.compiler.is_compiling():
            return
        assert self.group is not None
        agree(self.group, f"{fits:x}", "call of the model, with all that shard_batch returned", self.device)
        self._has_met = fits


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
    refuse_model(model, layers)
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
    try:
        window = _window(module, split.position_ids, query, key, attention_mask, dropout, sliding_window, options)
    except ValueError:
        with suppress(ValueError):  # this rank's own refusal says more than that the others differ
            split.meet(fits=False)
        raise
    split.meet(fits=True)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which torch's own attention obeys
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer = getattr(module, "layer_idx", None) or 0
    return split.context.attend(q, k, v, layer=layer, window=window, scale=scaling, softcap=softcap), None


def _window(
    module: nn.Module,
    position_ids: Tensor,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    options: Mapping[str, Any],
) -> int | None:
    """A layer's window, or None; refuses a call that is not on the tokens, and with the options, of the split."""
    if (why := refusal(attention_mask)) is not None:
        raise ValueError(why)
    if dropout:
        raise ValueError(f"attention dropout must be 0, got {dropout}; set config.attention_dropout = 0.0")
    if options.get("is_causal") is False:
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
    _check_positions(module, options.get("position_ids"), position_ids)
    return window


def _check_positions(module: nn.Module, given: Tensor | None, expected: Tensor) -> None:
    """Refuses position ids that are not the shard's: left out, a model would count each shard from 0."""
    if given is None:
        raise ValueError(
            f"position_ids must reach the attention layers, and {type(module).__name__} is handed none: a shard that "
            "was counted from 0 would go unnoticed; use a class of transformers that hands them down"
        )
    if torch.compiler.is_compiling() or given.data_ptr() == expected.data_ptr():
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
        refuse_mask(num_tokens, num_tokens, given["attention_mask"] == 1)
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
