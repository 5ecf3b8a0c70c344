"""What ``method="auto"`` chose is logged once for all that is asked, and by rank 0 alone."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.context import SequenceContext, attention, prepare, shard
from longspan.context.attend import where_of
from tests.ranks import run_ranks


class Kept(logging.Handler):
    """Keeps the messages that say a choice."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("attention over"):
            self.messages.append(text)


def ask_often(rank: int, world: int) -> list[str]:
    kept, log = Kept(), logging.getLogger("longspan.context.choose")
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    group = dist.group.WORLD
    for lengths in ([64], [64], [40, 24], [41, 23], [42, 22], [20, 44]):  # new masks, of which few are chosen anew
        mask = masks.documents(lengths)
        q, k, v = (shard(torch.randn(1, 64, heads, 8), mask, group) for heads in (4, 2, 2))
        attention(q, k, v, mask=mask, group=group)
        where = where_of(group, torch.device("cpu"), dtype=torch.float32, head_dim=8)
        prepare(mask, num_heads=4, num_kv_heads=2, group=group, where=where)
        SequenceContext(mask, group).attend(q, k, v, layer=0)
    return kept.messages


def test_a_choice_is_said_once_and_by_rank_0() -> None:
    first, second = run_ranks(ask_often, 2)
    assert second == []
    said = [text.split(";")[0] for text in first]  # "attention over 2 ranks: method ..., layout ..."
    assert said and len(set(said)) == len(said)
    assert all("2 ranks: method " in text and "longspan plan --explain" in text for text in first)
