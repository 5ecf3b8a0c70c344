"""The tables of pruned schedules of all ranks in closed form, without the lists: what choosing a method prices.

Every method moves whole shards over known paths, so that what pruning leaves of a move is the tokens that some rank of
the path reads, and all of it follows from who reads what (``local.Reads``). Each method here says which (step, rank)
computes each pair of shards and which (step, src, dst) carries how many tokens, as arrays over the pairs. The tables
equal those of ``estimate.tabulate`` on the pruned schedule, row by row; the tests hold them to that.

Cost: a millisecond a method for 64 ranks, where the lists take 0.3 to 2 s.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from longspan.context.carry import Burst, Direct, Exchange, LightSeq, Opposing, Ring, TokenRing, Windows
from longspan.context.estimate import KINDS, Table
from longspan.context.geometry import Geometry
from longspan.context.methods import carries
from longspan.context.pieces import Fragments, fragments, runs_of
from longspan.context.reads import Side, last_hop, reads_of
from longspan.context.schedule import Kind
from longspan.context.shares import head_shares

# The inputs of queries, and their result, of each phase.
_FORWARD: tuple[tuple[Kind, ...], Kind] = ("q",), "o"
_BACKWARD: tuple[tuple[Kind, ...], Kind] = ("q", "do"), "dq"


class _Rows:
    """Collects the blocks and moves of one phase."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []  # (n, 8): those of a table, but an identity of the queries, and the shape
        self.moves: list[np.ndarray] = []  # (n, 7): those of a table, rows, complete

    def block(self, step, rank, rows, keys, heads, kv_heads, queries, shape) -> None:
        """Blocks; those of no key are left out."""
        self.blocks.append(_filled(3, step, rank, rows, keys, heads, kv_heads, queries, shape))

    def move(self, kind: Kind, step, src, dst, rows, *, lands=None, complete: np.ndarray | bool = False) -> None:
        """Moves of ``rows`` tokens × heads; those of none are left out."""
        lands = step if lands is None else lands
        self.moves.append(_filled(5, step, src, dst, lands, KINDS.index(kind), rows, complete))

    def computed(self, world: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a table, and their shapes."""
        blocks = np.concatenate(self.blocks)
        order = np.argsort(blocks[:, 0], kind="stable")
        _, first = np.unique(blocks[order, 6] * world + blocks[order, 1], return_index=True)
        again = np.ones(len(blocks), np.int64)
        again[order[first]] = 0
        return np.concatenate([blocks[:, :6], again[:, None]], axis=1), blocks[:, 7]


def _filled(which: int, *columns) -> np.ndarray:
    """(n, columns): columns of one shape, where the one of that number is above 0."""
    shape = np.broadcast_shapes(*map(np.shape, columns))
    at = np.nonzero(np.broadcast_to(columns[which], shape))
    out = np.empty((len(at[0]), len(columns)), np.int64)
    for number, column in enumerate(columns):
        out[:, number] = np.broadcast_to(column, shape)[at] if np.ndim(column) else column
    return out


class World:
    """A mask on a layout for all ranks, and what the methods' tables share.

    Arrays of pairs are (world, world), the queries' owner first. ``table`` gives both phases of a method.
    """

    def __init__(self, geometry: Geometry, num_heads: int, num_kv_heads: int) -> None:
        self.layout, self.geometry, self.world = geometry.layout, geometry, geometry.layout.world
        self.heads, self.kv_heads = num_heads, num_kv_heads
        self.group_size = num_heads // num_kv_heads
        self.i, self.j = np.indices((self.world, self.world))
        self.reads = reads_of(geometry)
        self.keys, self.queries = Side(self.reads, self.reads.keys), Side(self.reads, self.reads.queries)
        # An identity of a set of atoms is the sum of its random numbers.
        self.num_shapes = self.world * (self.world + 3)  # no method has more
        self._group_pieces: dict[int, np.ndarray] = {}
        self.tickets = np.random.default_rng(0).integers(1 << 40, size=len(self.reads.owner))

    @cached_property
    def helped(self) -> np.ndarray:
        """bool (world, world): the pairs that the keys' owner computes in LightSeq, and not the queries'."""
        return (self.i - self.j) % self.world > self.world // 2

    # Shapes and their pieces of bands

    @cached_property
    def _pair_fragments(self) -> Fragments:
        """The pieces of bands of all pairs of shards, each a block: queries' owner · world + keys' owner."""
        pairs = np.stack(np.nonzero(self.keys.tokens), 1)
        shards = runs_of(self.reads, self.geometry, self.reads.owner == np.arange(self.world)[:, None])
        found = fragments(shards, pairs, self.geometry)
        return found._replace(block=(pairs @ (self.world, 1))[found.block])

    @cached_property
    def areas(self) -> np.ndarray:
        """(world, world): allowed pairs of tokens of each pair of shards."""
        found = self._pair_fragments
        return np.bincount(found.block, found.area, self.world**2).reshape(self.world, self.world)

    @cached_property
    def pair_pieces(self) -> np.ndarray:
        """The pieces of all pairs of shards, each a shape, on what is left of the shards when they are narrowed."""
        found = self._pair_fragments
        i, j = np.divmod(found.block, self.world)
        cuts, sizes, first = self.reads.cuts, self.reads.sizes, np.array(self.layout.offsets)

        def place(marks: np.ndarray, which: np.ndarray, slot: np.ndarray) -> np.ndarray:
            """The place of a slot among the tokens that are left when a shard is narrowed."""
            atom = np.searchsorted(cuts, slot, "right") - 1
            left = marks * sizes
            return (np.cumsum(left, axis=1) - left)[which, atom] + slot - cuts[atom]

        q0, k0 = place(self.reads.queries, j, first[i] + found.q0), place(self.reads.keys, i, first[j] + found.k0)
        q1, k1 = q0 + found.q1 - found.q0, k0 + found.k1 - found.k0
        return found._replace(q0=q0, q1=q1, k0=k0, k1=k1).joined()

    def _joint_pieces(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The pieces of blocks on several shards together, bool (shapes, atoms) each."""
        some = np.flatnonzero(keys.any(1))
        pairs = np.stack([some, some + len(queries)], 1)
        found = fragments(
            runs_of(self.reads, self.geometry, np.concatenate([queries, keys])), pairs, self.geometry
        ).joined()
        found[:, 0] = some[found[:, 0]]
        return found

    @cached_property
    def _pair_tickets(self) -> np.ndarray:
        return self.queries.per_owner(self.queries.marks * self.tickets).T

    def _pairs(self, rows: _Rows, step: np.ndarray, rank: np.ndarray, heads: int, kv_heads: int) -> None:
        """Blocks of all pairs of shards."""
        queries, shape = self._pair_tickets, self.i * self.world + self.j
        rows.block(step, rank, self.queries.tokens.T, self.keys.tokens, heads, kv_heads, queries, shape)

    def _both(self, forward: _Rows, backward: _Rows, pieces: np.ndarray, *, keeps: bool = False) -> tuple[Table, Table]:
        """The two tables. A backward phase without blocks of its own has the forward phase's."""
        tables, computed = [], (np.zeros((0, 7), np.int64), np.zeros(0, np.int64))
        for rows in (forward, backward):
            computed = rows.computed(self.world) if rows.blocks else computed
            blocks, shapes = computed
            moves = np.concatenate([np.zeros((0, 7), np.int64), *rows.moves])
            tables.append(
                Table(
                    world=self.world,
                    num_steps=1 + int(max(moves[:, 3].max(initial=-1), blocks[:, 0].max(initial=-1))),
                    backward=rows is backward,
                    blocks=blocks,
                    num_shapes=self.num_shapes,
                    shapes=shapes,
                    pieces=pieces,
                    moves=moves[:, :5],
                    rows=moves[:, 5].astype(np.float64),
                    complete=moves[:, 6] > 0,
                    keeps=keeps and rows is forward,
                )
            )
        return tables[0], tables[1]

    # Moves that several methods have

    def _hop(self, rows: _Rows, side: Side, kinds: tuple[Kind, ...], up: int, heads: int) -> None:
        """Inputs that hop from rank to rank as far as somebody needs them."""
        step, owner = np.indices((self.world - 1, self.world))
        tokens = side.carried(up)
        src = (owner + up * step) % self.world
        for kind in kinds:
            rows.move(kind, step, src, (src + up) % self.world, tokens * heads)

    def _follow(self, rows: _Rows, up: int, heads: int) -> None:
        """dkv that hops from reader to reader and home; atoms that travel equally far go together."""
        hops, owner = self.keys.hops(up), self.reads.owner
        last = last_hop(hops)
        order = np.argsort(owner * self.world + last, kind="stable")
        order = order[last[order] > 0]
        if not len(order):
            return
        group = (owner * self.world + last)[order]
        starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
        hops, sizes = hops[order], self.reads.sizes[order]
        reads = np.logical_or.reduceat(hops, starts)
        there = np.logical_or.accumulate(hops[:, 1:], axis=1)
        tokens = np.add.reduceat(there * sizes[:, None], starts)
        number, hop = np.nonzero(reads[:, 1:])
        following = np.append(np.where(number[1:] == number[:-1], hop[1:] + 1, 0), 0)
        complete = (following == 0) & ~reads[number, 0]
        first, hop = owner[order][starts][number], hop + 1
        src, dst = (first + up * hop) % self.world, (first + up * following) % self.world
        rows.move("dkv", hop + 1, src, dst, tokens[number, hop - 1] * heads, complete=complete)

    def _sent(self, rows: _Rows, step: np.ndarray, some: np.ndarray | bool = True) -> None:
        """Keys of some pairs straight to the reader."""
        rows.move("kv", step, self.j, self.i, self.keys.tokens * (self.i != self.j) * some * self.kv_heads)

    def _home(self, rows: _Rows, step: np.ndarray, some: np.ndarray | bool = True) -> None:
        """dkv of some pairs straight to the owner."""
        tokens = self.keys.tokens * (self.i != self.j) * some * self.kv_heads
        rows.move("dkv", step, self.i, self.j, tokens, lands=step + 1, complete=self.keys.alone)

    def _returned(self, rows: _Rows, kind: Kind, step: np.ndarray, some: np.ndarray | bool = True) -> None:
        """Sums of some pairs' queries from the keys' rank straight to their owner."""
        tokens = self.queries.tokens.T * (self.i != self.j) * some * self.heads
        rows.move(kind, step, self.j, self.i, tokens, lands=step + 1, complete=self.queries.alone.T)

    # Methods

    def ring(self, up: int) -> tuple[Table, Table]:
        forward, backward = _Rows(), _Rows()
        self._ring(forward, up, self.heads, self.kv_heads)
        backward.moves += forward.moves
        self._follow(backward, up, self.kv_heads)
        return self._both(forward, backward, self.pair_pieces)

    def _ring(self, rows: _Rows, up: int, heads: int, kv_heads: int) -> None:
        self._pairs(rows, up * (self.i - self.j) % self.world, self.i, heads, kv_heads)
        self._hop(rows, self.keys, ("kv",), up, kv_heads)

    def opposing(self) -> tuple[Table, Table] | None:
        """None for a single KV head, which is split by tokens."""
        if self.kv_heads == 1:
            return None
        forward, backward = _Rows(), _Rows()
        half = self.kv_heads // 2
        for up, num in ((1, half), (-1, self.kv_heads - half)):
            self._ring(forward, up, num * self.group_size, num)
            self._follow(backward, up, num)
        backward.moves += forward.moves
        return self._both(forward, backward, self.pair_pieces)

    def double_ring(self, inner: int) -> tuple[Table, Table]:
        world, windows = self.world, self.world // inner
        (w, p), (w_i, p_i), (w_j, p_j) = (np.divmod(x, inner) for x in (self.reads.owner, self.i, self.j))
        outer, hop = np.arange(windows)[:, None], np.arange(inner)
        rank = (w[:, None, None] + outer) % windows * inner + (p[:, None, None] + hop) % inner
        hops = self.reads.keys[rank, np.arange(len(rank))[:, None, None]]  # (atoms, windows, inner)
        inside, across = last_hop(hops), last_hop(np.logical_or.reduce(hops, axis=2))
        step = (w_i - w_j) % windows * inner + (p_i - p_j) % inner
        tokens = self.keys.tokens_of(inside.T[:, None, :] > hop[:-1, None])  # (windows, inner - 1, owner)
        owner = np.arange(world)
        w_o, p_o = np.divmod(owner, inner)
        window = (w_o + outer[..., None]) % windows * inner
        place = p_o + hop[:-1, None]
        forward, backward = _Rows(), _Rows()
        self._pairs(forward, step, self.i, self.heads, self.kv_heads)
        at = outer[..., None] * inner + hop[:-1, None]
        forward.move("kv", at, window + place % inner, window + (place + 1) % inner, tokens * self.kv_heads)
        far, at = self.keys.tokens_of(across > outer[:-1]), outer[:-1] * inner
        src, dst = ((w_o + outer[:-1] + more) % windows * inner + p_o for more in (0, 1))
        forward.move("kv", at, src, dst, far * self.kv_heads, lands=at + inner - 1)
        backward.moves += forward.moves
        self._home(backward, step + 1)
        return self._both(forward, backward, self.pair_pieces)

    def direct(self, carry: Direct) -> tuple[Table, Table]:
        forward, backward = _Rows(), _Rows()
        step, pieces = self._calls(forward, carry, 0)
        self._sent(forward, step - 1)
        if not carry.keep:
            backward.moves += forward.moves
            self._home(backward, step + 1)
            return self._both(forward, backward, pieces)
        step, others = self._calls(backward, carry.back, int(step.max()) + 1, turned=True)
        self._home(backward, step + 1)
        keeps = bool((self.keys.tokens * (self.i != self.j)).any())
        return self._both(forward, backward, np.concatenate([pieces, others]), keeps=keeps)

    def _calls(self, rows: _Rows, carry: Direct, first: int, *, turned: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of all ranks, a call of each in a step, whose shapes begin with ``first`` · world.

        Returns the step in which each pair of shards is computed, (world, world), and the pieces of the shapes.
        """
        world, reads, call = self.world, self.reads, carry.calls(self.world)
        num = int(call[-1]) + 1
        away = (reads.owner - np.arange(world)[:, None]) % world  # of each atom of queries, from a rank of keys
        queries = np.stack([(reads.queries & (call[away] == n)).any(0) for n in range(num)])
        # By (call, rank); the same numbers for atoms of keys and their reader.
        keys = reads.keys & (call[(np.arange(world)[:, None] - reads.owner) % world] == np.arange(num)[:, None, None])
        at, rank = np.indices((num, world))
        own = queries[:, None] & (reads.owner == np.arange(world)[:, None])
        pieces = self._joint_pieces(*(m.reshape(num * world, -1) for m in (own, keys)))
        pieces[:, 0] += first * world
        tokens = self.queries.tokens_of(queries), keys @ reads.sizes
        tickets, shape = self.queries.per_owner(queries * self.tickets), (first + at) * world + rank
        step, at = ((num - 1 - x if turned else x) for x in (call[(self.i - self.j) % world], at))
        rows.block(at, rank, *tokens, self.heads, self.kv_heads, tickets, shape)
        return step, pieces

    def token_ring(self) -> tuple[Table, Table]:
        forward, backward = _Rows(), _Rows()
        step = (self.j - self.i) % self.world
        self._pairs(forward, step, self.j, self.heads, self.kv_heads)
        for rows, (inputs, result) in ((forward, _FORWARD), (backward, _BACKWARD)):
            self._hop(rows, self.queries, inputs, 1, self.heads)
            self._returned(rows, result, step + 1)
        return self._both(forward, backward, self.pair_pieces)

    def burst(self) -> tuple[Table, Table]:
        forward, backward = _Rows(), _Rows()
        self._ring(forward, 1, self.heads, self.kv_heads)
        self._pairs(backward, (self.j - self.i) % self.world, self.j, self.heads, self.kv_heads)
        self._hop(backward, self.queries, ("q", "do"), 1, self.heads)
        hops = self.queries.hops(1)
        there = np.logical_or.accumulate(hops[:, 1:], axis=1).T  # (hops, atoms) from the first after the owner
        hop, owner = np.indices((self.world - 1, self.world))
        lacking = there & (hops[:, 0] | (last_hop(hops) > hop[:, :1] + 1))
        tokens, missing = self.queries.tokens_of(there), self.queries.tokens_of(lacking)
        src = (owner + hop + 1) % self.world
        dst = (src + 1) % self.world
        backward.move("dq", hop + 2, src, dst, tokens * self.heads, complete=missing == 0)
        return self._both(forward, backward, self.pair_pieces)

    def light_seq(self) -> tuple[Table, Table]:
        away, helped = (self.i - self.j) % self.world, self.helped
        step, rank = np.where(helped, self.world - away, away), np.where(helped, self.j, self.i)
        forward, backward = _Rows(), _Rows()
        self._pairs(forward, step, rank, self.heads, self.kv_heads)
        for rows, (inputs, result) in ((forward, _FORWARD), (backward, _BACKWARD)):
            self._sent(rows, step - 1, ~helped)
            for kind in inputs:
                rows.move(kind, step - 1, self.i, self.j, self.queries.tokens.T * helped * self.heads)
            self._returned(rows, result, step + 1, helped)
        self._home(backward, step + 1, ~helped)
        return self._both(forward, backward, self.pair_pieces)

    def exchange(self, degree: int, stages: int = 1) -> tuple[Table, Table]:
        """USP, and Ulysses where one group has all ranks, in stages of heads."""
        world, reads, groups = self.world, self.reads, self.world // degree
        shares = head_shares(self.heads, self.kv_heads, degree, stages)
        facts = np.array([(s.place, s.stage, s.returns, s.complete) for s in shares])
        place, stage, returns, whole = facts.T[..., None]
        ranges = np.array([(s.heads, s.kv_heads, s.fetched) for s in shares])
        heads, kv_heads, sent = np.maximum(ranges[..., 1] - ranges[..., 0], 0).T[..., None]
        group, owner = reads.owner // degree, np.arange(world)
        keys, queries = (
            np.logical_or.reduce(m.reshape(groups, degree, -1), axis=1) for m in (reads.keys, reads.queries)
        )
        read = self.keys.tokens_of(keys)  # (reading group, owner)
        readers = self.keys.per_owner((keys & (keys.sum(0) > 1)).astype(np.int64)) == 0
        q_tokens, k_tokens = (self.keys.tokens_of(np.logical_or.reduce(marks, axis=0)) for marks in (queries, keys))
        q_group = self.queries.tokens_of(queries).reshape(groups, groups, degree).sum(2).T  # (queries', keys')
        k_group = read.reshape(groups, groups, degree).sum(2)
        tickets = self.queries.per_owner(queries * self.tickets).reshape(groups, groups, degree).sum(2).T
        mine = group == np.arange(groups)[:, None]
        joint = queries & mine[:, None], keys[:, None] & mine  # (queries' group, keys' group, atoms)
        if degree not in self._group_pieces:
            joined = self._joint_pieces(*(m.reshape(groups * groups, -1) for m in joint))
            self._group_pieces[degree] = joined
        pieces = self._group_pieces[degree]
        hops = keys[(group[:, None] + np.arange(groups)) % groups, np.arange(len(group))[:, None]]
        step, source = np.indices((groups - 1, groups))
        passed = self.keys.tokens_of(last_hop(hops) > step[:, :1]).reshape(groups - 1, groups, degree).sum(2)
        g, h = np.indices((groups, groups))
        rank = owner // degree * degree + place  # (entries, owner): who has the owner's tokens for a share of the heads
        others = rank != owner
        forward, backward = _Rows(), _Rows()
        for rows, (inputs, result) in ((forward, _FORWARD), (backward, _BACKWARD)):
            wide = [x[:, None] for x in (stage, place, heads, kv_heads)]
            if rows is forward:
                at = (g - h) % groups + 2 + wide[0]
                rows.block(at, g * degree + wide[1], q_group, k_group, wide[2], wide[3], tickets, g * groups + h)
            rows.move(inputs[-1], stage + 1, owner, rank, q_tokens * heads * others)
            if rows is forward:
                rows.move("kv", stage, owner, rank, k_tokens * sent * others, lands=stage + 1)
            src, dst = ((source + step + more) % groups * degree + wide[1] for more in (0, 1))
            rows.move("kv", step + 2, src, dst, passed * wide[3])
            at = stage + groups + 2
            rows.move(result, at, rank, owner, q_tokens * heads * others, lands=at + 1, complete=True)
        reader = np.arange(groups)[:, None] * degree + place[:, None]  # (entries, group, 1)
        at = (np.arange(groups)[:, None] - owner // degree) % groups + 3 + stage[:, None]
        tokens = read * (kv_heads * returns)[:, None] * (reader != owner)
        backward.move("dkv", at, reader, owner, tokens, lands=at + 1, complete=readers & (whole[:, None] > 0))
        return self._both(forward, backward, pieces, keeps=bool(self.keys.tokens.any()))

    def table(self, name: str) -> tuple[Table, Table] | None:
        """Forward and backward tables of a method; None for one that has no closed form."""
        (carry,) = carries(name, self.world)
        match carry:
            case Ring(up):
                return self.ring(up)
            case Opposing():
                return self.opposing()
            case Windows(inner):
                return self.double_ring(inner)
            case Direct():
                return self.direct(carry)
            case Exchange(degree, stages):
                return self.exchange(degree, stages)
            case TokenRing():
                return self.token_ring()
            case Burst():
                return self.burst()
            case LightSeq():
                return self.light_seq()
