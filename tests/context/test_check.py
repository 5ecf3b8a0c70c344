"""The checker bites: of all small damages to all methods' schedules, none that changes a result is let through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from longspan.attention.kernels import pick
from longspan.context.check import ScheduleError, areas, check
from longspan.context.emulate import emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.methods import builder
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule
from longspan.layout.tokens import make_layout
from tests.context.cases import MASKS, assert_equal, inputs
from tests.context.mutations import DAMAGES, damaged
from tests.oracles.attention import dense_attention

CASES = [
    ("ring", "contiguous", "causal", 4),
    ("ring", "striped", "full", 3),
    ("ring", "zigzag", "holes", 4),
    ("descending", "zigzag", "causal", 3),
    ("opposing", "contiguous", "prefix", 3),
    ("token_ring", "contiguous", "full", 3),
    ("token_ring", "zigzag", "causal", 3),
    ("light_seq", "contiguous", "causal", 4),
    ("ulysses", "zigzag", "causal", 3),
    ("usp:2", "contiguous", "window", 4),
    ("burst", "contiguous", "full", 3),
    ("double_ring:2", "zigzag", "documents", 4),
    ("mask_aware", "zigzag", "causal", 3),
    ("kept_keys", "zigzag", "causal", 4),
]
IDS = ["-".join(case[:3]) for case in CASES]


@dataclass
class Case:
    """A right schedule, and whether another one computes the same."""

    schedule: Schedule
    geometry: Geometry

    def __post_init__(self) -> None:
        mask = self.geometry.mask
        q, k, v, dout = inputs(mask.num_tokens, 4, 2, d=2, b=1)
        self.inputs = q, k, v, dout
        self.settings = Settings(pick(q, softcap=None, name="reference"), 0.7, None)
        self.expected = dense_attention(q, k, v, dout, mask.dense().numpy(), scale=0.7)

    def refuses(self, schedule: Schedule) -> bool:
        try:
            check(schedule, self.geometry)
        except ScheduleError as error:
            assert "\n" not in str(error)
            return True
        return False

    def is_right(self, schedule: Schedule) -> bool:
        q, k, v, dout = self.inputs
        try:
            assert_equal(emulate(schedule, self.geometry, q, k, v, self.settings, dout), self.expected)
        except (AssertionError, IndexError, KeyError, ValueError, RuntimeError):
            return False  # a damaged program may break in any of the interpreter's look-ups
        return True


def _case(method: str, layout: str, mask: str, world: int) -> Case:
    num_tokens = 3 * world + 1
    geometry = Geometry(MASKS[mask](num_tokens), make_layout(layout, num_tokens, world))
    return Case(prune_schedule(builder(method, world)(geometry.layout, 4, 2), geometry), geometry)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """What nothing has written must not be right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_damage_that_changes_a_result_is_let_through(case, nan_in_fresh_memory) -> None:
    right = _case(*case)
    assert not right.refuses(right.schedule) and right.is_right(right.schedule)
    for name, damage in DAMAGES.items():
        num, num_refused = 0, 0
        for schedule in damaged(right.schedule, damage):
            num += 1
            if right.refuses(schedule):
                num_refused += 1
            else:
                assert right.is_right(schedule), f"{name}: let through {schedule}"
        # Copying an input twice is no fault, so most second copies are let through, nor is sending a sum home later, or
        # computing earlier on keys that were kept; any other damage mostly is one.
        least = {"duplicate_move": 0, "shift_move": 0.4, "shift_block": 0.4}.get(name, 0.5)
        assert num_refused >= num * least, f"{name}: {num_refused} of {num} refused"


@pytest.mark.slow
def test_few_right_programs_are_refused(nan_in_fresh_memory) -> None:
    """A block that also spans rows without work is refused though it does no harm; hardly anything else is."""
    num, num_right = 0, 0
    for case in CASES:
        right = _case(*case)
        for damage in DAMAGES.values():
            for schedule in damaged(right.schedule, damage):
                if right.refuses(schedule):
                    num += 1
                    num_right += right.is_right(schedule)
    assert num_right <= 0.01 * num, f"{num_right} of {num} refused schedules were right"


def _schedule(moves: list[Move], blocks: list[Block]) -> tuple[Schedule, Geometry]:
    layout = make_layout("contiguous", 8, 2)
    geometry = Geometry(MASKS["full"](8), layout)
    schedule = prune_schedule(builder("ring", 2)(layout, 2, 1), geometry)
    return replace(schedule, forward=Phase(tuple(moves), tuple(blocks))), geometry


EVERY_BLOCK = [
    Block(step, rank, ((4 * rank, 4 * rank + 4),), ((k, k + 4),), (0, 2))
    for step, rank, k in ((0, 0, 0), (0, 1, 4), (1, 0, 4), (1, 1, 0))
]
SWAP = [Move(0, 0, 1, Piece("kv", ((0, 4),), (0, 1))), Move(0, 1, 0, Piece("kv", ((4, 8),), (0, 1)))]


def test_the_hand_written_schedule_is_right() -> None:
    check(*_schedule(SWAP, EVERY_BLOCK))


@pytest.mark.parametrize(
    ("moves", "blocks", "message"),
    [
        (SWAP[:1], EVERY_BLOCK, r"forward step 1: rank 0 computes on kv of slots \(\(4, 8\),\) before it has arrived"),
        (SWAP, EVERY_BLOCK[:3], r"head 0, queries of slots \(\(4, 8\),\), keys .* computed 0 times"),
        (SWAP, [*EVERY_BLOCK, EVERY_BLOCK[0]], "computed more than once"),
        ([*SWAP, replace(SWAP[0], src=1, dst=0)], EVERY_BLOCK, "rank 1 sends kv .* to rank 0 but does not hold it"),
        ([replace(SWAP[0], dst=2), SWAP[1]], EVERY_BLOCK, "ranks are 0..1"),
        ([*SWAP, Move(1, 0, 1, Piece("dq", ((0, 4),), (0, 2)))], EVERY_BLOCK, "dq cannot move in this phase"),
        ([*SWAP, Move(1, 0, 1, Piece("o", ((0, 4),), (0, 2)))], EVERY_BLOCK, "rank 1 keeps o of slots"),
        ([*SWAP, Move(0, 0, 1, Piece("o", ((0, 4),), (0, 2)))], EVERY_BLOCK, "rank 0 sends o .* does not hold it"),
        (SWAP, [*EVERY_BLOCK[:3], replace(EVERY_BLOCK[3], heads=(0, 3))], "heads 0..2"),
        (SWAP, [*EVERY_BLOCK[:3], replace(EVERY_BLOCK[3], k=((2, 4), (0, 2)))], "sorted and disjoint"),
        (SWAP, [*EVERY_BLOCK[:3], replace(EVERY_BLOCK[3], k=((0, 9),))], "within 8 tokens"),
    ],
)
def test_what_is_wrong_is_said(moves, blocks, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(*_schedule(moves, blocks))


def test_heads_must_be_grouped() -> None:
    schedule, geometry = _schedule(SWAP, EVERY_BLOCK)
    with pytest.raises(ScheduleError, match="multiple of KV heads, got 2 and 3"):
        check(replace(schedule, num_kv_heads=3), geometry)


def test_a_move_needs_two_ranks_and_time() -> None:
    piece = Piece("kv", ((0, 4),), (0, 1))
    with pytest.raises(ValueError, match="two ranks, got 1 -> 1 at step 0"):
        Move(0, 1, 1, piece)
    with pytest.raises(ValueError, match="step 2 and lands 1"):
        Move(2, 0, 1, piece, lands=1)


def test_areas_say_who_works_how_much() -> None:
    geometry = Geometry(MASKS["causal"](24), make_layout("zigzag", 24, 3))
    schedule = prune_schedule(builder("ring", 2)(geometry.layout, 4, 2), geometry)
    assert areas(schedule, geometry) == (400, 400, 400)
    assert sum(areas(schedule, geometry)) == 4 * geometry.mask.area
