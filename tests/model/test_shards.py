"""Sharded models: initialisation, import and export equal one process; a rank touches its own shard only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longspan.model import load_pretrained, save_pretrained
from longspan.model.config import MoeConfig
from longspan.model.decoder import DecoderLM, build, init_weights
from longspan.model.hf_files import TensorFiles
from longspan.model.huggingface import load_into
from longspan.model.shards import local_part
from tests.model.test_decoder import BASE, GPT2, ids
from tests.ranks import run_ranks

# More rows than are drawn together, and no size that the ranks divide.
CONFIGS = {
    "llama": dataclasses.replace(BASE, vocab_size=149),
    "gpt2": dataclasses.replace(GPT2, vocab_size=149),
    # Fewer experts than some ranks, and more rows of an expert than are drawn together.
    "mixtral": dataclasses.replace(BASE, moe=MoeConfig(num_experts=3, experts_per_token=2, inner_size=71)),
}


def sharded(name: str, world: int, how: str) -> DecoderLM:
    """On the meta device, sharded by FSDP2 along rows, by tensor parallelism along rows and columns, or by both."""
    model = build(CONFIGS[name])
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    else:
        size = world if how == "tensor" else 2
        whole = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
            parallelize_module(block, whole["tensor"], plan)
        mesh = whole["data"]
    if how != "tensor":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
    return model


def whole(model: DecoderLM) -> dict[str, torch.Tensor]:
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()
    }


def same(a: DecoderLM, b: DecoderLM) -> None:
    x, y = whole(a), whole(b)
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name], y[name]), name


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []
    read = TensorFiles.read

    def counted(self: TensorFiles, name: str, region: Any) -> torch.Tensor:
        found = read(self, name, region)
        reads.append(found.numel())
        return found

    monkeypatch.setattr(TensorFiles, "read", counted)
    return reads


def round_trip(rank: int, world: int, name: str, how: str, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        model = sharded(name, world, how)
        model.to_empty(device="cpu")
        init_weights(model, 7)
        single = build(CONFIGS[name], device="cpu", seed=7)
        same(model, single)

        save_pretrained(model, f"{folder}/out", max_file_bytes=20_000)
        dist.barrier()
        same(load_pretrained(f"{folder}/out"), single)

        again = sharded(name, world, how)
        again.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in again.parameters():
                local_part(parameter)[0].fill_(float("nan"))
        reads = count_reads(patch)
        load_into(again, f"{folder}/out")
        assert sum(reads) == sum(local_part(p)[0].numel() for p in again.parameters())
        assert how == "tensor" or sum(reads) < 0.8 * sum(p.numel() for p in again.parameters())
        same(again, single)

        if how == "fsdp":
            torch.testing.assert_close(again(ids(9)), single(ids(9)))
            torch.testing.assert_close(again.loss(ids(9), ids(9, seed=1)), single.loss(ids(9), ids(9, seed=1)))
            with pytest.raises(ValueError, match="without a checkpoint"):
                save_pretrained(again, f"{folder}/out")


@pytest.mark.parametrize(
    ("name", "world", "how"),
    [
        ("gpt2", 3, "fsdp"),
        ("gpt2", 4, "both"),
        ("mixtral", 4, "fsdp"),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in [("llama", 2, "fsdp"), ("gpt2", 2, "tensor"), ("llama", 4, "both")]
        ),
    ],
)
def test_ranks_equal_one_process(name: str, world: int, how: str, tmp_path: Path) -> None:
    run_ranks(round_trip, world, name, how, str(tmp_path))


def failing_disk(rank: int, world: int, folder: str) -> str:
    model = sharded("llama", world, "fsdp")
    model.to_empty(device="cpu")
    init_weights(model, 0)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:

            def full(*args: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left") as caught:
            save_pretrained(model, f"{folder}/out", max_file_bytes=20_000)
    return str(caught.value)


def test_a_full_disk_is_told_to_all_ranks(tmp_path: Path) -> None:
    assert len(set(run_ranks(failing_disk, 2, str(tmp_path)))) == 1
    assert list((tmp_path / "out").iterdir()) == []
