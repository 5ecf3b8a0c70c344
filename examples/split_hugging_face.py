"""A stock Hugging Face model trains on a sequence that no rank holds whole: three lines, and the unsplit model's loss.

Run it with `torchrun --standalone --nproc-per-node 2 examples/split_hugging_face.py`, on any number of ranks. It needs
`pip install transformers`; the model is small and random.
"""
# run: ranks 2

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.context.hf_attention import attach, shard_batch


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # every rank makes the same model and reads the same batch
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 101, (1, 1001))
    documents = torch.cat([torch.arange(700), torch.arange(301)])[None]  # position ids restart: two documents
    batch = {"input_ids": ids, "labels": ids, "position_ids": documents}
    whole = model(**batch, use_cache=False).loss  # only to have something to compare with
    expected = torch.autograd.grad(whole, list(model.parameters()))

    split = attach(model, dist.group.WORLD)  # once
    local = shard_batch(batch, split)  # every step
    loss = model(**local).loss  # summed over the ranks, the loss of the whole sequence
    loss.backward()

    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = 0.0
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)  # a sum, not a mean
        worst = max(worst, float((parameter.grad - reference).abs().max() / reference.abs().max()))
    assert abs(total / whole.detach() - 1) < 1e-5 and worst < 1e-5, f"off by {worst:.1e}"
    if dist.get_rank() == 0:
        tokens = local["input_ids"].shape[1]
        print(f"{tokens} of {ids.shape[1]} tokens here; loss {total:.4f}, unsplit {whole.detach():.4f}")
        print(f"largest relative error of a gradient {worst:.1e}")
    dist.barrier()  # no rank closes its connections while another still reads from them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
