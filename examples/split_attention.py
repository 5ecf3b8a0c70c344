"""Attention over a sequence that no rank holds whole, beside the same attention on one: outputs and gradients agree.

Run it with `torchrun --standalone --nproc-per-node 2 examples/split_attention.py`, on any number of ranks.
"""
# run: ranks 2

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from longspan.attention import masks
from longspan.context import attention, shard, unshard


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # every rank draws the same global tensors, only to have something to compare with
    group = dist.group.WORLD
    mask = masks.documents([700, 301])
    q, k, v = (torch.randn(1, 1001, heads, 16, requires_grad=True) for heads in (4, 2, 2))

    local = [shard(x, mask, group) for x in (q, k, v)]
    out = attention(*local, mask=mask, group=group)
    assert out.shape[1] <= -(-1001 // dist.get_world_size()), "this rank holds its share of the tokens, not all"
    grads = torch.autograd.grad(out.square().sum(), local)

    b_h_s_d = [x.transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*b_h_s_d, attn_mask=mask.dense(), enable_gqa=True).transpose(1, 2)
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))

    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected, *expected_grads), strict=True):
        error = (unshard(mine.detach(), mask, group) - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5, f"{name} is off by {error:.1e}"
        if dist.get_rank() == 0:
            print(f"{name}: {mine.shape[1]} of {theirs.shape[1]} tokens here, largest relative error {error:.1e}")
    dist.barrier()  # no rank closes its connections while another still reads from them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
