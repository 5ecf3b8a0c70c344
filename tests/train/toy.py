"""A small stand-in for the training loop: a toy MLP under CheckpointStore, Heartbeat and InterruptFlag on gloo ranks.

`python -m tests.train.toy RUN_DIR --steps N ...` is one rank; with `--ranks N` it starts N of itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def build(shard: bool, world_size: int, dim: int = 7) -> tuple[nn.Module, torch.optim.AdamW]:
    """The same model on any number of ranks; the odd sizes divide by nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, 3, bias=False), nn.LayerNorm(3))
    if shard:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Every rank sees the same batch, made from the step alone: the result does not depend on the ranks."""
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (1 + step)
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(1000 + step))
    loss = model(x).square().sub(x[:, :3].sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def run(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from longspan.train.checkpoint import CheckpointStore
    from longspan.train.launch import discover, init_process_group
    from longspan.train.liveness import Heartbeat, InterruptFlag

    launch = discover()
    init_process_group(args.timeout, device="cpu", launch=launch)
    directory = Path(args.directory)
    store = CheckpointStore(directory / "checkpoints", keep=args.keep)
    model, optimizer = build(args.shard, launch.world_size, args.dim)
    step = -1
    (directory / f"pid_{launch.rank}").write_text(str(os.getpid()))
    dist.barrier()
    first = store.load(None, model, optimizer)["step"] + 1 if args.resume else 0
    with (
        Heartbeat(
            directory / "heartbeats", launch.rank, launch.world_size, interval_s=0.25, timeout_s=args.timeout
        ) as heart,
        InterruptFlag(announce="leaving" if launch.rank == 0 else None) as interrupt,
    ):
        for step in range(first, args.steps):
            heart.beat(step)
            if step == args.raise_at and launch.rank == 1:
                raise ValueError("the data file is empty")
            if step == args.hang_at and launch.rank == 1:
                time.sleep(600)
            loss = train_step(model, optimizer, step)
            total = torch.tensor([loss, float(interrupt.requested)])
            dist.all_reduce(total)
            if launch.rank == 0:
                with (directory / "losses").open("a") as file:
                    print(step, repr(total[0].item()), file=file)
            leave = bool(total[1])
            if leave or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                store.save_async(step, model, optimizer, {"step": step})
            if leave:
                break
            time.sleep(args.pause)
        landed = store.wait()
    if launch.rank == 0:
        print("left at step", step, "landed" if landed else "not landed")
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    for name, kind, default in (
        ("ranks", int, 0),
        ("steps", int, 8),
        ("save-every", int, 2),
        ("keep", int, 3),
        ("dim", int, 7),
        ("hang-at", int, -1),
        ("raise-at", int, -1),
        ("pause", float, 0.0),
        ("timeout", float, 30.0),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    from longspan.train.launch import local_ranks
    from longspan.train.liveness import LostRankError, fail

    if args.ranks:
        at = sys.argv.index("--ranks")
        argv = sys.argv[1:at] + sys.argv[at + 2 :]
        return local_ranks(
            args.ranks, argv, command=("-m", "tests.train.toy"), hint=lambda: "continue with --resume latest"
        )
    try:
        run(args)
    except LostRankError as error:
        fail(str(error))
    except ValueError as error:
        fail(str(error), code=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
