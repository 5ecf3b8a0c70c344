"""Generating text token by token with a KV cache.

`CachedContext` implements the Context that mixers ask for: it appends each layer's keys and values to a cache and
attends with the new rows over everything cached, so that a model run step by step gives the same logits as one run over
the whole row. Prompts are read in pieces, which bounds the memory of their attention.

Cost of a step over m cached tokens: 2·parameters + 4·m·h·d·layers FLOPs. Cache: 2·b·m·g·d·layers elements, up to twice
that as it doubles. A layer with a window keeps all its keys too, but reads only the window.

Top-k: Fan et al., 2018, arXiv:1805.04833. Top-p (nucleus): Holtzman et al., 2020, arXiv:1904.09751: the smallest set of
most likely tokens whose probability reaches p. Order: temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from longspan.model.config import LearnedPositionsConfig

if TYPE_CHECKING:
    from longspan.model.decoder import DecoderLM

FINISHED = -1
_PROMPT_PIECE = 512


class CachedContext:
    """A sequence that grows: announce the next tokens with `extend`, then run the model on them with this context.

    Args:
        capacity: tokens to reserve room for; the cache doubles when it is passed.
        device: where the positions live; the cache follows the keys it is given.
    """

    def __init__(self, *, capacity: int = 256, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {capacity}; give the expected length")
        self._capacity = capacity
        self._device = torch.device(device)
        self._start = self._stop = 0
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far, those announced last included."""
        return self._stop

    @property
    def positions(self) -> Int[Tensor, " l"]:
        """Positions of the tokens announced last."""
        return torch.arange(self._start, self._stop, device=self._device)

    @property
    def memory_bytes(self) -> int:
        """Bytes the cache holds now, over all layers."""
        return sum(x.nbytes for pair in self._cache.values() for x in pair)

    def extend(self, num_tokens: int) -> None:
        """Announces that the next run of the model is over `num_tokens` further tokens.

        Raises:
            ValueError: fewer than one token, or a layer that has not attended for the tokens announced before.
        """
        if num_tokens < 1:
            raise ValueError(f"extend needs at least 1 token, got {num_tokens}; skip the run of the model instead")
        if any(written != self._stop for written in self._written.values()) or (self._stop and not self._written):
            raise ValueError(f"the model has not run over the {self._stop} tokens announced so far; run it first")
        self._start, self._stop = self._stop, self._stop + num_tokens

    def attend(
        self,
        q: Float[Tensor, "b l h d"],
        k: Float[Tensor, "b l g d"],
        v: Float[Tensor, "b l g d"],
        *,
        layer: int,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "b l h d"]:
        """Appends k and v to the layer's cache; causal attention of q over all of it, or over the last `window` keys.

        Raises:
            ValueError: rows that are not those announced by `extend`, a layer that attends twice, or gradients.
        """
        if q.shape[1] != self._stop - self._start:
            raise ValueError(
                f"the context expects the {self._stop - self._start} tokens announced, got {q.shape[1]}; "
                "call extend before each run of the model"
            )
        if self._written.get(layer, 0) != self._start:
            raise ValueError(
                f"layer {layer} has {self._written.get(layer, 0)} cached tokens, needs {self._start}; "
                "each layer attends once after extend, and layers have numbers of their own"
            )
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError(
                f"a cache carries no gradients, got keys of layer {layer} that need them; use torch.no_grad()"
            )
        keys, values = self._append(layer, k, v)
        first = 0 if window is None else max(0, self._start - window + 1)
        return _attend(q, keys[:, first:], values[:, first:], window=window, scale=scale, softcap=softcap)

    def total(self, x: Tensor) -> Tensor:
        """`x` itself: no other process holds tokens."""
        return x

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pair = self._cache.get(layer)
        if pair is None or pair[0].shape[1] < self._stop:
            while self._capacity < self._stop:
                self._capacity *= 2
            old_keys, old_values = pair or (None, None)
            pair = _grow(old_keys, k, self._capacity), _grow(old_values, v, self._capacity)
            self._cache[layer] = pair
        for store, new in zip(pair, (k, v), strict=True):
            store[:, self._start : self._stop] = new
        self._written[layer] = self._stop
        return pair[0][:, : self._stop], pair[1][:, : self._stop]


def generate(
    model: DecoderLM,
    prompt_ids: Int64[Tensor, "b l"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yields, as soon as each is known, the next token of every row: a list of b ids.

    A row ends with one of `stop_ids` (which is yielded) and gives -1 afterwards; the iterator ends when every row has,
    or after `max_new_tokens`. Gradients are off while the model runs. Options are checked at the call, not at the first
    token.

    Args:
        model: on the device where it is to run; the prompt is moved there.
        prompt_ids: prompts of one length.
        max_new_tokens: at most this many tokens a row.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; None: all.
        top_p: sample among the fewest tokens that together have this probability; None: all.
        seed: of the sampling, which is done on the CPU so that equal logits give equal text on every device.
        stop_ids: tokens that end a row.

    Raises:
        ValueError: an option out of its range, an empty prompt, ids outside the vocabulary, more positions than the
            model has learned; while running: logits that are NaN.
    """
    _check_prompt(model, prompt_ids, max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    return _generate(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids))


def _generate(
    model: DecoderLM,
    prompt_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[list[int]]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ctx = CachedContext(capacity=prompt_ids.shape[1] + min(max_new_tokens, 256), device=device)
    running = [True] * prompt_ids.shape[0]
    ids = prompt_ids.to(device)
    for _ in range(max_new_tokens):
        logits = _last_logits(model, ids, ctx).float().cpu()
        if logits.isnan().any():
            raise ValueError(f"the logits after token {ctx.num_tokens} are NaN; check the checkpoint and its dtype")
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield [t if alive else FINISHED for t, alive in zip(token.tolist(), running, strict=True)]
        running = [alive and t not in stop_ids for t, alive in zip(token.tolist(), running, strict=True)]
        if not any(running):
            return
        ids = token[:, None].to(device)


@torch.no_grad()
def _last_logits(model: DecoderLM, ids: Tensor, ctx: CachedContext) -> Tensor:
    """Logits (b, vocab) after the last of `ids`; the head runs on that row only."""
    hidden = None
    for piece in ids.split(_PROMPT_PIECE, dim=1):
        ctx.extend(piece.shape[1])
        hidden = model.hidden(piece, ctx)
    assert hidden is not None
    return model.logits(hidden[:, -1])


def sample(
    logits: Float[Tensor, "b vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " b"]:
    """One token a row from the truncated distribution; ties go to the lower id.

    Raises:
        ValueError: an option out of its range.
    """
    _check_sampling(temperature, top_k, top_p)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if temperature == 0:
        return order[:, 0]
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        # A token stays while those before it have not yet reached p; the first always does.
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = 0
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of the last rows of a causal sequence: query i of n stands at key m - n + i."""
    (b, n, h, d), (m, g) = q.shape, k.shape[1:3]
    mask = None
    # One row sees every key it is given, and a whole square without a window is the kernel's own causal case.
    is_causal = n == m and n > 1 and (window is None or window >= m) and softcap is None
    if n > 1 and not is_causal:
        behind = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    if n == 1:
        # The heads that share a KV head become rows: the cache is read once and never repeated.
        q = q.reshape(b, g, h // g, d).transpose(1, 2)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if softcap is None:
        grouped = query.shape[1] != g
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    else:
        out = _softcapped(query, key, value, mask, d**-0.5 if scale is None else scale, softcap)
    return out.reshape(b, 1, h, d) if n == 1 else out.transpose(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The plain formula on `b h l d`, in fp32 at least; no fused kernel caps its scores."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1))
    scores = softcap * torch.tanh(grouped @ k.to(wide)[:, :, None].mT * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.to(wide)[:, :, None]).flatten(1, 2).to(q.dtype)


def _grow(old: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    store = new.new_empty((new.shape[0], capacity, *new.shape[2:]))
    if old is not None:
        store[:, : old.shape[1]] = old
    return store


def _check_prompt(model: DecoderLM, prompt_ids: Tensor, max_new_tokens: int) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.dtype != torch.int64:
        raise ValueError(
            f"prompt_ids must be int64 of shape (b, l), got {prompt_ids.dtype} of {tuple(prompt_ids.shape)}; "
            "put one prompt in a batch of one"
        )
    if prompt_ids.numel() == 0:
        raise ValueError("the prompt must have at least one token, got none; give a text or a start token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}; leave the call out for none")
    config = model.config
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"prompt ids must lie in 0..{config.vocab_size - 1}, got {low if low < 0 else high}; "
            "use the checkpoint's own tokenizer"
        )
    # The last new token is never read back.
    needed = prompt_ids.shape[1] + max_new_tokens - 1
    if isinstance(config.positions, LearnedPositionsConfig) and needed > config.positions.max_positions:
        raise ValueError(
            f"the model has learned {config.positions.max_positions} positions, got {prompt_ids.shape[1]} prompt and "
            f"{max_new_tokens} new tokens; shorten either"
        )


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out to sample among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}; leave it out to sample among all tokens")
