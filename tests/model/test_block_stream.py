"""Blocks by way of the device: copies made ahead, host values in force, what is changed written back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from longspan.model.block_stream import BlockStream

DEVICE = torch.device("cpu")


def _any(blocks: Any) -> Any:
    return blocks


def make(num: int = 4) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3, bias=False)) for _ in range(num)]


def storage(block: nn.Module) -> int:
    return next(block.parameters()).untyped_storage().data_ptr()


@pytest.mark.parametrize("num_buffers", [2, 3, 9])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_each_block_runs_in_a_buffer_with_its_own_values(num_buffers, way):
    blocks = make()
    x = torch.randn(2, 3)
    want = [block(x) for block in blocks]
    stream = BlockStream(blocks, DEVICE, num_buffers)
    homes = [storage(block) for block in blocks]
    for _ in range(2):
        seen, buffers = [], set()
        for block in getattr(stream, way)():
            seen.append(blocks.index(block))
            buffers.add(storage(block))
            assert torch.equal(block(x), want[seen[-1]])
            assert storage(block) not in homes
        assert seen == (list(range(4)) if way == "forward" else [3, 2, 1, 0])
        assert len(buffers) == min(num_buffers, 4)
        assert [storage(block) for block in blocks] == homes


def test_the_next_block_is_fetched_before_the_body_runs():
    stream = BlockStream(make(), DEVICE)
    for index, _ in enumerate(stream.forward()):
        assert {slot.index for slot in stream._slots} == {index, min(index + 1, 3)} | ({2} if index == 3 else set())


@torch.no_grad()
def test_changes_in_place_are_written_back_or_dropped():
    """As a zeroth-order optimiser does it: no autograd, perturb, run, write back."""
    blocks = make()
    stream = BlockStream(blocks, DEVICE)
    before = [[p.clone() for p in block.parameters()] for block in blocks]
    for write_back, factor in ((False, 1), (True, 3)):
        for block in stream.forward(write_back=write_back):
            for p in block.parameters():
                p.mul_(3)
        for block, values in zip(blocks, before, strict=True):
            assert all(torch.equal(p, factor * v) for p, v in zip(block.parameters(), values, strict=True))
    blocks[1][0].weight.zero_()
    assert [block[0].weight.any().item() for block in _any(stream.backward())] == [True, True, False, True]


def test_another_dtype_on_the_device():
    blocks = make()
    blocks[0].register_buffer("table", torch.arange(3))
    want = [block[0].weight.bfloat16() for block in blocks]
    stream = BlockStream(blocks, DEVICE, dtype=torch.bfloat16)
    for block, weight in zip(_any(stream.forward()), want, strict=True):
        assert torch.equal(block[0].weight, weight)
        assert block[0].weight.dtype == torch.bfloat16
    assert blocks[0][0].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="write_back needs blocks in their own dtype"):
        next(stream.forward(write_back=True))


def test_a_broken_body_leaves_the_host_tensors():
    blocks = make()
    stream = BlockStream(blocks, DEVICE)
    homes = [storage(block) for block in blocks]
    with pytest.raises(KeyError):
        for _ in stream.forward():
            raise KeyError
    assert [storage(block) for block in blocks] == homes


def test_what_cannot_be_streamed_is_refused():
    blocks = make(2)
    with pytest.raises(ValueError, match="two buffers or more, got 2 blocks and 1 buffers"):
        BlockStream(blocks, DEVICE, 1)
    with pytest.raises(ValueError, match="two buffers or more, got 0 blocks"):
        BlockStream([], DEVICE)
    with pytest.raises(ValueError, match=r"may not share parameters, got 0.weight in 0 and 1"):
        BlockStream([blocks[0], nn.Sequential(blocks[0][0])], DEVICE)
    with pytest.raises(ValueError, match=r"parameters with memory, got .* on meta"):
        BlockStream([nn.Linear(2, 2, device="meta")], DEVICE)
