"""The schedule language: one program for all ranks of a context-parallel attention.

A *schedule* says which rank sends what to whom, and which rank computes which block, step by step. It addresses data by
content (which tokens, which heads), so there are no buffer names, no waits and no merges to write: dependencies follow
from what is read and written. Tokens are slots of the layout (``layout.tokens``): rank r owns one interval of slots.

Within a step every rank first posts its moves (a snapshot of what it holds), then computes its blocks, then takes in
what lands in this step. Two kinds of data:

* inputs ``q``, ``kv`` and ``do`` (the output's gradient with its lse and delta) are *copied*: sender keeps them;
* sums ``o`` (with its lse), ``dq`` and ``dkv`` are *moved*: sending takes them out, landing merges them in. Every
  partial result must be back with the owner of its tokens at the end.

The mask stays outside: a block is all allowed pairs of its queries and keys, and ``passes.prune`` removes whatever the
mask makes idle. A method is a function ``(layout, num_heads, num_kv_heads) -> Schedule``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Literal

from longspan.context.geometry import Range, Ranges
from longspan.layout.tokens import Layout, even_split

Kind = Literal["q", "kv", "do", "o", "dq", "dkv"]
INPUTS: tuple[Kind, ...] = ("q", "kv", "do")
SUMS: tuple[Kind, ...] = ("o", "dq", "dkv")
KV_KINDS: tuple[Kind, ...] = ("kv", "dkv")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens (slots) and heads of one kind of data; heads are KV heads for kv and dkv, else query heads."""

    kind: Kind
    tokens: Ranges
    heads: Range


@dataclass(frozen=True, slots=True)
class Move:
    """``src`` posts the piece at ``step``; ``dst`` has it from the end of step ``lands`` (by default the same) on.

    Moves on different lanes do not wait for each other. An input that is ``kept`` stays with ``dst`` until the end of
    the backward phase, which then need not send it again. A sum that is ``complete`` lacks no contribution: it travels
    in the inputs' dtype, to which the result is rounded anyway (``passes.mark_complete`` finds these).
    """

    step: int
    src: int
    dst: int
    piece: Piece
    lands: int = -1
    lane: int = 0
    kept: bool = False
    complete: bool = False

    def __post_init__(self) -> None:
        if self.lands < 0:
            object.__setattr__(self, "lands", self.step)
        if self.src == self.dst:
            raise ValueError(f"a move needs two ranks, got {self.src} -> {self.dst} at step {self.step}")
        if self.lands < self.step:
            raise ValueError(f"a move cannot land before it is posted, got step {self.step} and lands {self.lands}")
        if self.kept and self.piece.kind not in ("q", "kv"):
            raise ValueError(f"only q and kv can be kept for the backward phase, got {self.piece.kind}")


def homewards(step: int, src: int, dst: int, piece: Piece, *, complete: bool = False) -> Move:
    """Sums sent to the owner of their tokens: nobody waits for them, so they may be under way for one more step."""
    return Move(step, src, dst, piece, lands=step + 1, complete=complete)


@dataclass(frozen=True, slots=True)
class Block:
    """``rank`` computes all allowed pairs of queries ``q`` and keys ``k`` (slots) for query ``heads``: one call."""

    step: int
    rank: int
    q: Ranges
    k: Ranges
    heads: Range


@dataclass(frozen=True, slots=True)
class Phase:
    """Moves and blocks of a forward or a backward pass. List order is the order of posting and of landing."""

    moves: tuple[Move, ...]
    blocks: tuple[Block, ...]

    @property
    def num_steps(self) -> int:
        return 1 + max([move.lands for move in self.moves] + [block.step for block in self.blocks], default=-1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Forward and backward program of all ranks for one layout and one head grouping."""

    name: str
    layout: Layout
    num_heads: int
    num_kv_heads: int
    forward: Phase
    backward: Phase
    dkv: Literal["home", "follow"] | None = None  # how the backward phase was derived (``passes.replay``), if it was
    replayed: Phase | None = None  # the forward phase that it was derived from, if that is another method's

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def fingerprint(self) -> str:
        """Stable digest of the whole program, in hexadecimal: ranks compare it before they run."""
        text = repr((self.name, self.layout.ranks, self.num_heads, self.num_kv_heads, self.forward, self.backward))
        return blake2b(text.encode(), digest_size=8).hexdigest()


def kv_heads_of(heads: Range, group_size: int) -> Range:
    """The KV heads that a range of query heads reads."""
    return heads[0] // group_size, -(-heads[1] // group_size)


def head_ranges(num_heads: int, parts: int) -> list[Range]:
    """Heads split as evenly as can be; parts beyond the heads are empty."""
    edges = [0, *accumulate(even_split(num_heads, parts))]
    return list(pairwise(edges))


def ordered(moves: Iterable[Move], world: int) -> tuple[Move, ...]:
    """Moves by step, then by distance (dst - src) mod world, so that no rank is everybody's first target."""
    return tuple(sorted(moves, key=lambda m: (m.step, m.lane, (m.dst - m.src) % world, m.src)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes per element that a byte count depends on. ``sums`` is 4 where partial results travel in fp32."""

    batch: int = 1
    head_dim: int = 64
    inputs: int = 2
    sums: int = 4

    def of(self, piece: Piece, *, complete: bool = False) -> int:
        """Bytes of one piece: kv is two tensors; o carries an fp32 lse, do an lse and a delta."""
        rows = self.batch * sum(stop - start for start, stop in piece.tokens) * (piece.heads[1] - piece.heads[0])
        sums = self.inputs if complete else self.sums
        row_bytes = {
            "q": self.head_dim * self.inputs,
            "kv": 2 * self.head_dim * self.inputs,
            "do": self.head_dim * self.inputs + 2 * max(4, self.sums),
            "o": self.head_dim * sums + max(4, self.sums),
            "dq": self.head_dim * sums,
            "dkv": 2 * self.head_dim * sums,
        }
        return rows * row_bytes[piece.kind]

    def of_move(self, move: Move) -> int:
        """Bytes of a move on the wire."""
        return self.of(move.piece, complete=move.complete)


def bytes_sent(phase: Phase, world: int, sizes: Sizes) -> list[int]:
    """Bytes that each rank sends in a phase."""
    sent = [0] * world
    for move in phase.moves:
        sent[move.src] += sizes.of_move(move)
    return sent
