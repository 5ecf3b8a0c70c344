"""Small damages to a schedule: what a mistake in a method, or in a pass, would look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from longspan.context.schedule import Block, Move, Phase, Schedule

Damage = Callable[[Phase, int], Iterator[Phase]]


def _with_move(phase: Phase, index: int, *moves: Move) -> Phase:
    return Phase((*phase.moves[:index], *moves, *phase.moves[index + 1 :]), phase.blocks)


def _with_block(phase: Phase, index: int, *blocks: Block) -> Phase:
    return Phase(phase.moves, (*phase.blocks[:index], *blocks, *phase.blocks[index + 1 :]))


def drop_move(phase: Phase, world: int) -> Iterator[Phase]:
    for index in range(len(phase.moves)):
        yield _with_move(phase, index)


def duplicate_move(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        yield _with_move(phase, index, move, move)


def retarget_move(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        for dst in range(world):
            if dst not in (move.src, move.dst):
                yield _with_move(phase, index, replace(move, dst=dst))


def reroute_source(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        src = (move.src + 1) % world
        if src != move.dst:
            yield _with_move(phase, index, replace(move, src=src))


def shift_move(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        for by in (-1, 1):
            if move.step + by >= 0:
                yield _with_move(phase, index, replace(move, step=move.step + by, lands=move.lands + by))
        yield _with_move(phase, index, replace(move, lands=move.lands + 1))
        if move.lands > move.step:
            yield _with_move(phase, index, replace(move, lands=move.lands - 1))


def shorten_piece(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        (start, stop), *rest = move.piece.tokens
        for first in (
            ((start + 1, stop),) if stop - start > 1 else (),
            ((start, stop - 1),) if stop - start > 1 else (),
        ):
            tokens = (*first, *rest)
            if tokens:
                yield _with_move(phase, index, replace(move, piece=replace(move.piece, tokens=tokens)))


def drop_heads_of_move(phase: Phase, world: int) -> Iterator[Phase]:
    for index, move in enumerate(phase.moves):
        first, last = move.piece.heads
        if last - first > 1:
            for heads in ((first + 1, last), (first, last - 1)):
                yield _with_move(phase, index, replace(move, piece=replace(move.piece, heads=heads)))


def drop_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index in range(len(phase.blocks)):
        yield _with_block(phase, index)


def duplicate_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index, block in enumerate(phase.blocks):
        yield _with_block(phase, index, block, block)


def shift_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index, block in enumerate(phase.blocks):
        for by in (-1, 1):
            if block.step + by >= 0:
                yield _with_block(phase, index, replace(block, step=block.step + by))


def move_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index, block in enumerate(phase.blocks):
        yield _with_block(phase, index, replace(block, rank=(block.rank + 1) % world))


def shorten_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index, block in enumerate(phase.blocks):
        for side in ("q", "k"):
            ranges = getattr(block, side)
            start, stop = ranges[-1]
            for tokens in ((*ranges[:-1], (start, stop - 1)), (*ranges[:-1], (start, stop + 1))):
                tokens = tuple(pair for pair in tokens if pair[0] < pair[1])
                if tokens:
                    yield _with_block(phase, index, replace(block, **{side: tokens}))


def drop_heads_of_block(phase: Phase, world: int) -> Iterator[Phase]:
    for index, block in enumerate(phase.blocks):
        first, last = block.heads
        if last - first > 1:
            for heads in ((first + 1, last), (first, last - 1)):
                yield _with_block(phase, index, replace(block, heads=heads))


def swap_ranks(phase: Phase, world: int) -> Iterator[Phase]:
    """Two ranks exchange their parts: in the moves alone, in the blocks alone, and in both."""
    for first in range(world - 1):
        name = {first: first + 1, first + 1: first}
        moves = tuple(replace(m, src=name.get(m.src, m.src), dst=name.get(m.dst, m.dst)) for m in phase.moves)
        blocks = tuple(replace(b, rank=name.get(b.rank, b.rank)) for b in phase.blocks)
        yield Phase(moves, phase.blocks)
        yield Phase(phase.moves, blocks)
        yield Phase(moves, blocks)


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        drop_move,
        duplicate_move,
        retarget_move,
        reroute_source,
        shift_move,
        shorten_piece,
        drop_heads_of_move,
        drop_block,
        duplicate_block,
        shift_block,
        move_block,
        shorten_block,
        drop_heads_of_block,
        swap_ranks,
    )
}


def damaged(schedule: Schedule, damage: Damage) -> Iterator[Schedule]:
    """Every schedule with one such damage, in the forward or in the backward phase."""
    world = schedule.layout.world
    for phase in damage(schedule.forward, world):
        if phase != schedule.forward:
            yield replace(schedule, forward=phase)
    for phase in damage(schedule.backward, world):
        if phase != schedule.backward:
            yield replace(schedule, backward=phase)
