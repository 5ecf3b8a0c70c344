"""What a token mixer may ask of its surroundings.

A mixer mixes information between tokens. It is given the *local* tokens and a `Context`; whether these are the whole
sequence or one rank's share of it is the context's business alone, so that one mixer runs on one process, under every
context-parallel method, and inside a server.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Context(Protocol):
    """The sequence around the local tokens: where they stand, and how they attend to the rest."""

    @property
    def positions(self) -> Int[Tensor, " l"]:
        """Position ids (int64) of the local tokens, counted within their document; for rotary and learned positions."""
        ...

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
        """Softmax attention of the local queries over the whole sequence, under the context's mask.

        Args:
            q, k, v: local tensors, q and k already rotated; h is a multiple of g and query head i reads KV head i // (h
                / g).
            layer: index of the layer that asks (contexts with a cache keep one entry a layer).
            window: number of keys a query sees, itself included (Hugging Face's `sliding_window`); None: all that the
                mask allows.
            scale: factor on q·k before the softmax; None: d ** -0.5.
            softcap: c in c·tanh(scores / c), applied after `scale` and before the mask; None: no cap.
        """
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks that hold other tokens of the batch, on each of them; carries no gradient.

        Collective over those ranks. A process that holds the whole batch gives `x` itself.
        """
        ...
