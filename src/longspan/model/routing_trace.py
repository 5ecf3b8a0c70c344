"""A record of which experts tokens went to, for the placement of experts on ranks.

`record_routing(model)` notes what every sparse layer chooses in each forward of the model, once each also where blocks
are recomputed. A trace holds, and its `.npz` file has under the same names:

    experts      int32 (layers, tokens, k): the experts of each token, best first; an expert may have had no room
    weights      float32 (layers, tokens, k): the factors of their outputs
    layers       int32 (layers,): which layers of the model these are
    row_lengths  int64 (rows,): tokens of each row
    num_experts  int64 (): E

Tokens stand row after row, rows in the order of forwards and within one as in the batch, each row in the order of the
whole sequence, also where that is split over ranks. Ranks that hold other rows have traces of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import nn

from longspan.context.sequence import SequenceContext
from longspan.mixers.contract import Context
from longspan.model.decoder import DecoderLM
from longspan.model.moe import Routing

_ARRAYS = ("experts", "weights", "layers", "row_lengths", "num_experts")


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """The arrays named in the module."""

    experts: np.ndarray
    weights: np.ndarray
    layers: np.ndarray
    row_lengths: np.ndarray
    num_experts: int

    def __post_init__(self) -> None:
        layers, tokens = len(self.layers), int(self.row_lengths.sum())
        if self.experts.shape[:2] != (layers, tokens) or self.weights.shape != self.experts.shape:
            raise ValueError(
                f"a routing trace of {layers} layers and {tokens} tokens must have experts and weights of these, got "
                f"{self.experts.shape} and {self.weights.shape}: record it again"
            )

    def save(self, path: str | Path) -> None:
        """Writes a compressed npz file of exactly this name."""
        with open(path, "wb") as file:  # numpy would add an ending to a name
            arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
            np.savez_compressed(file, **arrays)

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Inverse of `save`; opens no pickle. Raises ValueError for a file that is no trace."""
        try:
            with np.load(path, allow_pickle=False) as found:
                values: dict[str, Any] = {name: found[name] for name in _ARRAYS}
        except (KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"a routing trace must be an npz file with {', '.join(_ARRAYS)}, got {path}: {error}"
            ) from None
        num_experts = int(values.pop("num_experts"))
        return RoutingTrace(**values, num_experts=num_experts)


class _Forward(NamedTuple):
    """One forward: the context, and what each layer chose so far, (b, l, k)."""

    ctx: Context
    experts: list[np.ndarray]
    weights: list[np.ndarray]


class Recorder:
    """What `record_routing` fills."""

    def __init__(self, layers: tuple[int, ...], num_experts: int) -> None:
        self.layers, self.num_experts = layers, num_experts
        self._forwards: list[_Forward] = []

    def add(self, layer: int, ctx: Context, routing: Routing) -> None:
        """Notes one layer of one forward."""
        if layer == self.layers[0]:
            self._forwards.append(_Forward(ctx, [], []))
        latest = self._forwards[-1]
        latest.experts.append(routing.experts.cpu().numpy().astype(np.int32))
        latest.weights.append(routing.weights.float().cpu().numpy())

    def trace(self) -> RoutingTrace:
        """All that was recorded. Collective over ranks that share sequences: each gets the trace of whole rows.

        Contexts must not have been renewed for another layout of the tokens since.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self._forwards:
            raise ValueError("a routing trace needs a forward, got none; run the model inside record_routing")
        parts, lengths = [], []
        for forward in self._forwards:
            pair = (np.stack(forward.experts), np.stack(forward.weights))
            if isinstance(forward.ctx, SequenceContext) and forward.ctx.world > 1:
                pair = _gathered(pair, forward.ctx)
            lengths += [pair[0].shape[2]] * pair[0].shape[1]
            parts.append([x.reshape(x.shape[0], -1, x.shape[-1]) for x in pair])
        experts, weights = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        return RoutingTrace(
            experts, weights, np.array(self.layers, np.int32), np.array(lengths, np.int64), self.num_experts
        )


def _gathered(pair: tuple[np.ndarray, np.ndarray], ctx: SequenceContext) -> tuple[np.ndarray, np.ndarray]:
    """The local tokens of all ranks of the context in the order of the sequence."""
    found: list[Any] = [None] * ctx.world
    dist.all_gather_object(found, pair, group=ctx.group)
    order = np.argsort(np.concatenate([ctx.layout.positions(rank) for rank in range(ctx.world)]))
    experts, weights = (np.concatenate(each, axis=2)[:, :, order] for each in zip(*found, strict=True))
    return experts, weights


@contextmanager
def record_routing(model: DecoderLM) -> Iterator[Recorder]:
    """Records the forwards of `model` until the block is left; `recorder.trace()` gives the result, then or later.

    Raises:
        ValueError: a model without experts.
    """
    moe, layers = model.config.moe, model.config.sparse_layers
    if moe is None:
        raise ValueError("routing is recorded of a model with experts, got one without: give its config a moe")
    recorder = Recorder(layers, moe.num_experts)

    def hook(layer: int) -> Any:
        def note(block: nn.Module, args: tuple[Any, ...], output: tuple[Any, Routing]) -> None:
            recorder.add(layer, args[1], output[1])

        return note

    with ExitStack() as hooks:
        for layer in layers:
            # Outside of recomputation, which runs a block's forward and not its hooks.
            handle = model.blocks[layer].register_forward_hook(hook(layer))
            hooks.callback(handle.remove)
        yield recorder
