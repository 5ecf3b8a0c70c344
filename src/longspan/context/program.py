"""What one rank does in a phase, in plain integers and tuples: what ``lower`` makes and the engine executes.

A data worker can build programs and send them to the training process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.attention.bands import Bands, total_area
from longspan.context.arena import Places
from longspan.context.geometry import Range
from longspan.context.schedule import Kind, Piece, Sizes


class Part(NamedTuple):
    """A rectangle (tokens x heads) of buffer ``buffer`` at (token, head), and its place in the assembled region."""

    buffer: int
    token: int
    head: int
    to_token: int
    to_head: int
    num_tokens: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class Region:
    """A (tokens, heads) array assembled from parts of buffers; one part of full size is read in place."""

    kind: Kind
    num_tokens: int
    num_heads: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """How a result or arrival enters the accumulators: rectangles to copy or merge; ``adopt`` takes it over whole."""

    kind: Kind
    adopt: int | None
    copies: tuple[Part, ...]  # here to_* is the place in the result and token, head the place in the buffer
    merges: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """``number`` counts the program's sends in order of posting; ``span`` is how many steps it may be under way."""

    number: int
    peer: int
    lane: int
    region: Region
    complete: bool
    span: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Posted with the sends of its step. An input goes into ``buffer`` from row ``token`` on; a sum is written when it
    lands. ``number`` counts the program's receives in order of posting."""

    number: int
    peer: int
    lane: int
    kind: Kind
    num_tokens: int
    num_heads: int
    buffer: int | None
    token: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Fill:
    """Own tokens that blocks read together with arrivals are copied to their place between them, once."""

    kind: Kind
    buffer: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Landing:
    receive: int  # its number
    write: Write | None


@dataclass(frozen=True, slots=True)
class Compute:
    """One kernel call. ``heads`` are the query heads, ``kv_heads`` the KV heads it reads."""

    q: Region
    kv: Region
    do: Region | None
    heads: Range
    kv_heads: Range
    bands: Bands
    writes: tuple[Write, ...]


@dataclass(slots=True)
class Step:
    sends: list[Send] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    computes: list[Compute] = field(default_factory=list)
    landings: list[Landing] = field(default_factory=list)
    frees: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Buffer:
    """What a buffer holds and when it lives (steps, inclusive)."""

    piece: Piece
    born: int
    dies: int


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's lowered phase. Buffers 0.. are the own inputs, then the own sums, in the order of ``own``.

    ``saved`` are the buffers of kept arrivals: what a forward phase hands to its backward phase, in the same order.
    ``packed`` are own inputs whose rows are sent more than once: they are laid out as a message once for all.
    """

    rank: int
    num_tokens: int
    group_size: int
    own: tuple[Kind, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    unwritten: tuple[tuple[Part, ...], ...]  # per own sum: rectangles that nothing ever writes
    saved: tuple[int, ...]
    packed: tuple[int, ...]
    places: dict[object, Places] = field(default_factory=dict, compare=False, repr=False)  # by sizes, as they are met

    @property
    def area(self) -> int:
        """Allowed (head, query, key) triples this rank computes."""
        return sum(total_area(c.bands) * (c.heads[1] - c.heads[0]) for step in self.steps for c in step.computes)

    def peak_bytes(self, sizes: Sizes) -> int:
        """Largest total of live buffers, own inputs and sums included, over the steps."""
        live = [sum(sizes.of(self.buffers[buffer].piece) for buffer in self.packed)] * (len(self.steps) + 1)
        for buffer in self.buffers:
            size = sizes.of(buffer.piece)
            for step in range(buffer.born, min(buffer.dies, len(self.steps)) + 1):
                live[step] += size
        return max(live)
