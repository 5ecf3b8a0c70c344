"""Lower bounds of a method's estimated time, from the allowed pairs and the keys of each two shards alone.

A few reductions of (world, world) arrays a method, which cost a fraction of its tables: by them ``choose`` leaves out
most methods before it has built anything. A bound counts a kernel's pairs at its full rate, calls and blocks at least
once where there is something to compute, and the busiest wire; what rows, tiles and merges cost on top it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from longspan.context.carry import Burst, Carry, Direct, Exchange, LightSeq, Opposing, Ring, TokenRing
from longspan.context.costs import dtype_of
from longspan.context.estimate import Known, kernel_of, narrowest, users, wires_s
from longspan.context.methods import carries
from longspan.context.reads import Side
from longspan.context.schedule import Sizes, head_ranges
from longspan.context.tables import World
from longspan.hardware.profile import DeviceProfile
from longspan.hardware.topology import Topology

Both = tuple[float, float]  # seconds of the forward and of the backward phase


class Bounds:
    """Bounds of all methods for a mask on a layout; arrays of pairs are (world, world), the queries' owner first."""

    def __init__(self, world: World, topology: Topology, device: DeviceProfile, sizes: Sizes, known: Known) -> None:
        self.world, self.topology, self.device, self.sizes, self.known = world, topology, device, sizes, known
        self.row_bytes = sizes.batch * sizes.head_dim * sizes.inputs

    def least_s(self, name: str) -> Both:
        """At most what the two phases of a method are estimated at."""
        (carry,) = carries(name, self.world.world)
        if isinstance(carry, Direct):
            return self._direct(carry)
        if isinstance(carry, Exchange):
            return self._exchange(carry.degree)
        computed, hopped = self._placed(carry, self._pairs_s), self._hops(carry)
        return max(computed[0], hopped[0]), max(computed[1], hopped[1])

    def kernels_s(self, name: str) -> Both:
        """What a method that computes shard by shard takes in kernels, exactly, on the busiest rank; (0, 0) for others.

        It costs the pieces of bands of all pairs of shards, which the tables of such a method need anyway.
        """
        (carry,) = carries(name, self.world.world)
        joint = isinstance(carry, Direct | Exchange)
        return (0.0, 0.0) if joint else self._placed(carry, self._exact_pairs_s)

    # Computation

    def _work_s(self, areas: np.ndarray, calls: np.ndarray, heads: int, *, backward: bool) -> np.ndarray:
        """Seconds of so many calls, each a block, that compute so many pairs of tokens."""
        device, sizes = self.device, self.sizes
        rate = device.pairs_per_s(head_dim=sizes.head_dim, dtype=dtype_of(sizes), backward=backward)
        kernel = device.backward if backward else device.forward
        return sizes.batch * heads * areas / rate + calls * (kernel.call_s + device.block_s)

    @cached_property
    def _pairs_s(self) -> tuple[np.ndarray, np.ndarray]:
        """A block for each pair of shards, in both phases."""
        areas, calls = self.world.areas, self.world.keys.tokens > 0
        forward, backward = (self._work_s(areas, calls, self.world.heads, backward=phase) for phase in (False, True))
        return forward, backward

    @cached_property
    def _exact_pairs_s(self) -> tuple[np.ndarray, np.ndarray]:
        """The same from the pieces of bands."""
        world, found = self.world, []
        for phase in (False, True):
            kernel = kernel_of(
                world.pair_pieces, world.num_shapes, world.heads, self.device, self.sizes, self.known, backward=phase
            )
            seconds = kernel.seconds + self.device.block_s * (kernel.rows > 0)
            found.append(seconds[: world.world**2].reshape(world.world, world.world))
        return found[0], found[1]

    def _placed(self, carry: Carry, pairs_s: tuple[np.ndarray, np.ndarray]) -> Both:
        """The busiest rank's time in the pairs of shards that it computes."""
        reader, owner = self.world.i, self.world.j
        ranks = reader, reader
        if isinstance(carry, TokenRing):
            ranks = owner, owner
        elif isinstance(carry, Burst):
            ranks = reader, owner
        elif isinstance(carry, LightSeq):
            ranks = (np.where(self.world.helped, owner, reader),) * 2
        forward_s, backward_s = (
            float(np.bincount(rank.ravel(), seconds.ravel()).max())
            for rank, seconds in zip(ranks, pairs_s, strict=True)
        )
        return forward_s, backward_s

    # Wires

    def _hop_s(self, side: Side, up: int, heads: int) -> float:
        """What hops from rank to rank, tensors × heads of each token, on the narrowest wire of a hop."""
        num = self.world.world
        hop, owner = np.indices((num - 1, num))
        tokens = np.bincount(((owner + up * hop) % num).ravel(), side.carried(up).ravel(), num)
        rank = np.arange(num)
        wire = narrowest(self.topology)[rank * num + (rank + up) % num]
        return float((tokens * heads * self.row_bytes / wire).max())

    def _loads_s(self, num_calls: int, call: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
        """(calls, wires + 1): seconds that messages from row to column, each of a call, keep the wires."""
        src, dst = np.nonzero(num_bytes)
        call, num_bytes, pair = call[src, dst], num_bytes[src, dst], src * self.world.world + dst
        of_call = [call == number for number in range(num_calls)]
        return np.stack([wires_s(pair[some], num_bytes[some], self.topology) for some in of_call])

    def _hops(self, carry: Carry) -> Both:
        """What inputs that hop from rank to rank keep the wires of a method that computes shard by shard."""
        world = self.world
        if isinstance(carry, Ring):
            keys_s = self._hop_s(world.keys, carry.up, 2 * world.kv_heads)
            return keys_s, keys_s
        if isinstance(carry, Opposing) and world.kv_heads > 1:  # a single KV head is split by tokens
            half = world.kv_heads // 2
            ways = (1, half), (-1, world.kv_heads - half)
            keys_s = max(self._hop_s(world.keys, up, 2 * num) for up, num in ways)
            return keys_s, keys_s
        queries_s = self._hop_s(world.queries, 1, world.heads)
        if isinstance(carry, TokenRing):
            return queries_s, 2 * queries_s  # the output's gradient hops with the queries
        if isinstance(carry, Burst):
            return self._hop_s(world.keys, 1, 2 * world.kv_heads), 2 * queries_s
        return 0.0, 0.0

    def _exchange(self, degree: int) -> Both:
        """The rank with the most heads of the group with the most work."""
        world, groups = self.world, self.world.world // degree
        first, last = head_ranges(world.heads, degree)[0]
        areas, tokens = (
            pairs.reshape(groups, degree, groups, degree).sum((1, 3)) for pairs in (world.areas, world.keys.tokens)
        )
        forward, backward = (
            float(self._work_s(areas, tokens > 0, last - first, backward=phase).sum(1).max()) for phase in (False, True)
        )
        return forward, backward

    def _direct(self, carry: Direct) -> Both:
        """A rank computes a call when its keys are there, and sends their gradient home when it is computed."""
        forward_s = self._coming_s(carry, backward=False)
        if carry.keep:
            return forward_s, self._going_s(carry.back, turned=True)
        return forward_s, max(self._coming_s(carry, backward=True), self._going_s(carry))

    def _called(self, carry: Direct, *, backward: bool) -> tuple[np.ndarray, np.ndarray]:
        """(world, world): the call that takes a pair of shards; (calls, rank): seconds of the calls."""
        world = self.world
        call = carry.calls(world.world)[(world.i - world.j) % world.world]
        here = call == np.arange(int(call.max()) + 1)[:, None, None]
        areas, tokens = ((pairs * here).sum(2) for pairs in (world.areas, world.keys.tokens))
        return call, self._work_s(areas, tokens > 0, world.heads, backward=backward)

    def _coming_s(self, carry: Direct, *, backward: bool) -> float:
        """What is left to compute when the keys of a call have come."""
        call, seconds = self._called(carry, backward=backward)
        come = np.cumsum(self._loads_s(len(seconds), call.T, self._foreign.T * self.row_bytes), axis=0)
        left = np.cumsum(seconds[::-1], axis=0)[::-1]
        receives = users(self.topology)[1]
        return self._busiest(left[0], ((come[n], left[n], receives) for n in range(1, len(left))))

    def _going_s(self, carry: Direct, *, turned: bool = False) -> float:
        """What is left to send home when a call is done; ``turned``: the last call comes first."""
        call, seconds = self._called(carry, backward=True)
        of_sums = np.where(self.world.keys.alone, self.sizes.inputs, self.sizes.sums)
        num_bytes = self._foreign * of_sums * self.sizes.batch * self.sizes.head_dim
        loads = self._loads_s(len(seconds), call, num_bytes)
        if turned:
            done, gone = np.cumsum(seconds[::-1], axis=0)[::-1], np.cumsum(loads, axis=0)
        else:
            done, gone = np.cumsum(seconds, axis=0), np.cumsum(loads[::-1], axis=0)[::-1]
        sends = users(self.topology)[0]
        return self._busiest(seconds.sum(0), ((gone[n], done[n], sends) for n in range(1, len(done))))

    @cached_property
    def _foreign(self) -> np.ndarray:
        """(world, world): rows of k and v that one rank reads of another."""
        return self.world.keys.tokens * (self.world.i != self.world.j) * 2 * self.world.kv_heads

    @staticmethod
    def _busiest(computing: np.ndarray, calls: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
        """The most of the ranks' computing and of (wires' seconds, ranks' seconds, whom a wire serves)."""
        return float(
            max([computing.max(), *((wires + _least(ranks, of_rank)).max() for wires, ranks, of_rank in calls)])
        )


def _least(seconds: np.ndarray, of_rank: np.ndarray) -> np.ndarray:
    """(wires + 1,): the least of the ranks that a wire serves, bool (world, wires + 1); 0 for a wire of none."""
    found = np.where(of_rank, seconds[:, None], np.inf).min(axis=0)
    return np.where(np.isfinite(found), found, 0.0)
