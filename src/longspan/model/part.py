"""Which part of a decoder one process holds: layers of a pipeline rank, and a tensor rank's part of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from longspan.layout.expert_parallel import ALONE, ExpertSplit
from longspan.layout.tensor_parallel import WHOLE, TensorSplit


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A process's part of a model.

    Attributes:
        layers: indices of its layers; None for all.
        first, last: whether it embeds tokens, and whether it has the last norm and the head. Where head and embedding
            are tied, both hold the matrix.
        split: of each weight.
        experts: of each mixture's experts.
    """

    layers: tuple[int, ...] | None = None
    first: bool = True
    last: bool = True
    split: TensorSplit = WHOLE
    experts: ExpertSplit = ALONE


ALL = ModelPart()


class Layers(nn.ModuleList):
    """Blocks under the names of their own layers, of which a part of a model has only some."""

    def __init__(self, blocks: Iterable[tuple[int, nn.Module]]) -> None:
        super().__init__()
        for layer, block in blocks:
            self.add_module(str(layer), block)

    def of(self, layers: Iterable[int]) -> Iterator[nn.Module]:
        """The blocks of some layers, in their order."""
        return (self._modules[str(layer)] for layer in layers)  # type: ignore[misc]
