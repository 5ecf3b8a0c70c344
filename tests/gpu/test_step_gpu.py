"""What a training step runs on one CUDA device beside products and attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.mixers.config import AttentionConfig
from longspan.mixers.norm import PlusOneRMSNorm, RMSNorm
from longspan.model.decoder import build
from longspan.model.recompute import apply_recompute
from longspan.plan.plan import Plan
from longspan.train.config import OptimConfig, TrainConfig
from longspan.train.loop import NotFiniteError, Trainer
from tests.train.test_parity import CONFIG as SMALL
from tests.train.test_parity import micros

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # to forbid waits is a prototype of torch's
# Heads for which the kernels of a GPU are taken.
CONFIG = replace(SMALL, hidden_size=256, attention=AttentionConfig(num_heads=4, head_dim=64, num_kv_heads=2))


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [RMSNorm, PlusOneRMSNorm])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 65, 2048), torch.bfloat16), ((3, 7, 4, 64), torch.float32)])
def test_a_norm_is_its_formula(kind: type[RMSNorm], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kind(shape[-1], 1e-5).to("cuda", dtype)
    nn.init.normal_(norm.weight, std=0.5)
    x, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    x.requires_grad_()
    before = torch.cuda.memory_allocated()
    out = norm(x)
    kept = torch.cuda.memory_allocated() - before
    out.backward(grad)
    exact = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    want = normed * (weight + 1 if kind is PlusOneRMSNorm else weight)
    want.backward(grad.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, reference in ((out, want), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert got is not None and reference is not None and got.dtype == dtype
        assert (got.double() - reference).abs().max() <= tolerance * reference.abs().max()
    # The output, a factor a token, and 1 + weight; blocks of memory are of 512 bytes.
    assert kept <= x.nbytes + 4 * x[..., 0].numel() + 4 * shape[-1] + 3 * 512


def test_kept_attention_of_the_kernel_for_float32_is_that_of_a_plain_step() -> None:
    """The kernel's mask is made in its first call, which a selective checkpoint watches here, and autograd calls its
    backward in a thread that the kernel's own differentiation must not need."""
    length, vocabulary = 389, SMALL.vocab_size
    ids = torch.randint(vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for mode in ("attention", "none"):
        torch.manual_seed(0)
        model, ctx = build(CONFIG, device="cpu").to("cuda"), SequenceContext(masks.causal(length), device="cuda")
        apply_recompute(model, mode, keep_ops=(torch.ops.longspan.attention.default,))
        loss = model.loss(ids[:, :-1], ids[:, 1:], ctx)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("size", [1, 4095, 4096 * 3 + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_copy_is_that_of_torch(size: int, dtype: torch.dtype) -> None:
    from longspan.model.loss_cuda import scaled  # Triton comes with CUDA builds only

    wide, factor = torch.randn(size, device="cuda"), torch.tensor(0.37, device="cuda")
    assert torch.equal(scaled(wide, factor, dtype), (wide * factor).to(dtype))


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.usefixtures("one_rank")
def test_a_step_waits_for_no_work_that_the_device_has(precision: Any) -> None:
    """The host's one wait is for the loss, by an event: torch's own waits are errors here."""
    plan = Plan(context=1, precision=precision).fit(1)
    trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), CONFIG, plan, torch.device("cuda", 0))
    batches = micros(plan, 0, 1, False)
    figures = [trainer.step(step, 9, batches) for step in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures.append(trainer.step(2, 9, batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures[2]["loss"] < figures[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.usefixtures("one_rank")
def test_a_step_that_diverges_changes_nothing(precision: Any) -> None:
    plan, device = Plan(context=1, precision=precision).fit(1), torch.device("cuda", 0)
    config = TrainConfig(out=Path("unused"), seed=3, optim=OptimConfig(lr=0.01, warmup=0))
    stopped, fresh = (Trainer(config, CONFIG, plan, device) for _ in range(2))
    for step in range(2):
        gain = dict(stopped.model.named_parameters())["norm.weight"]
        before = [p.detach().clone() for p in stopped.model.parameters()]
        kept = gain.detach().clone()
        with torch.no_grad():
            gain.fill_(float("inf"))
        with pytest.raises(NotFiniteError, match="stopped before the optimiser step; the largest gradient is in"):
            stopped.step(step, 9, micros(plan, 0, 1, False))
        with torch.no_grad():
            gain.copy_(kept)
        assert all(torch.equal(p, q) for p, q in zip(stopped.model.parameters(), before, strict=True))
        assert len(stopped.optimizer.state) == len(fresh.optimizer.state)
        figures = [trainer.step(step, 9, micros(plan, 0, 1, False)) for trainer in (stopped, fresh)]
        assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-3)
        counts = [{float(state["step"]) for state in t.optimizer.state.values()} for t in (stopped, fresh)]
        assert counts == [{step + 1.0}] * 2
