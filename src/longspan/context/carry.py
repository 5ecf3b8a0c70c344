"""How the data of a method travel: what it takes to author one rank's part alone (``context.local``)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class Ring:
    """Keys hop from rank r to rank r + up, ``up`` being 1 or -1; their gradient follows them."""

    up: int


@dataclass(frozen=True, slots=True)
class Opposing:
    """Half of the KV heads on a ring up, half on a ring down; of a single one, the halves of each rank's keys."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Keys hop inside windows of ``inner`` ranks, which divides the ranks, and from window to window on lane 1."""

    inner: int


@dataclass(frozen=True, slots=True)
class Direct:
    """Keys go from their owner to each reader, in ``stages`` by distance; 0: in one, own keys joined with it.

    Readers that ``keep`` them begin the backward phase with the farthest keys, and end it with their own.
    """

    stages: int
    keep: bool = False

    @property
    def back(self) -> Direct:
        """The stages of a backward phase that waits for no keys, in the opposite order: two hide its sends."""
        return Direct(min(self.stages, 2))

    def sizes(self, world: int) -> list[int]:
        """From how many ranks the keys of each stage come.

        Stages grow: each hides behind the computation of the one before, the first behind that of the own keys alone.
        """
        total = world - 1
        stages = min(self.stages, total)
        if not stages:
            return [] if self.stages else [total]
        edges = [round(total * (stage / stages) ** 1.5) for stage in range(stages + 1)]
        for stage in range(1, stages):
            edges[stage] = max(edges[stage], edges[stage - 1] + 1)
        return [after - before for before, after in pairwise(edges)]

    def calls(self, world: int) -> np.ndarray:
        """(world,): by distance, the call that takes the keys; own ones have the first, or all have number 1."""
        sizes = self.sizes(world)
        return np.append(0 if self.stages else 1, np.repeat(np.arange(len(sizes)) + 1, sizes))


@dataclass(frozen=True, slots=True)
class Exchange:
    """Tokens are exchanged for heads in groups of ``degree`` ranks, which divides the ranks; groups' keys form a ring.

    In stages of heads where ``stages`` is above 1, which takes one group of all ranks.
    """

    degree: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class TokenRing:
    """Queries hop to rank r + 1; their results go straight home."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Keys hop to rank r + 1 in the forward phase; queries do in the backward phase, and their gradient after them."""


@dataclass(frozen=True, slots=True)
class LightSeq:
    """Keys go from rank r - t to r at step t; queries of rank r - t + w to r where r is below t, and results back."""


Carry = Ring | Opposing | Windows | Direct | Exchange | TokenRing | Burst | LightSeq
