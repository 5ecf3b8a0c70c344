"""Schedules, training and generation on one CUDA device. Run: pytest -m gpu tests/gpu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan.attention import masks
from longspan.attention.kernels import pick
from longspan.bench.exact import formula, make_inputs
from longspan.context.check import check
from longspan.context.choose import default_layout
from longspan.context.emulate import emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.methods import builder
from longspan.context.methods.ring import ring
from longspan.context.passes import prune_schedule
from longspan.layout.tokens import make_layout
from tests.oracles.attention import dense_attention

# Not errors here: torch's compiler warns of torch's own code, otherwise in each version.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def plain(q, k, v, allowed, dout, scale):
    """The formula in the dtype of the inputs, with its gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    size = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(size, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


@pytest.mark.parametrize("name", ["causal", "documents", "window"])
def test_emulated_ranks_are_as_exact_as_the_plain_formula(name: str) -> None:
    s, h, g, d = 1543, 8, 2, 64
    mask = {
        "causal": masks.causal(s),
        "documents": masks.documents([700, 43, 800]),
        "window": masks.sliding_window(s, 200, 0),
    }[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, s, heads, d, generator=generator).to("cuda", torch.bfloat16) for heads in (h, g, g, h)
    )
    exact = dense_attention(
        q.double().cpu(), k.double().cpu(), v.double().cpu(), dout.double().cpu(), mask.dense().numpy(), scale=d**-0.5
    )
    truths = [torch.from_numpy(x).cuda() for x in (exact.out, exact.dq, exact.dk, exact.dv)]
    allowed = plain(q, k, v, mask.dense().cuda(), dout, d**-0.5)
    errors = {}
    for world in (1, 2, 3, 8):
        layout = make_layout("zigzag", s, world)
        geometry = Geometry(mask, layout)
        schedule = prune_schedule(ring(layout, h, g), geometry)
        check(schedule, geometry)
        got = emulate(schedule, geometry, q, k, v, Settings(pick(q, softcap=None), d**-0.5, None), dout)
        assert got.grads is not None
        for what, mine, truth, bad in zip(
            ("out", "dq", "dk", "dv"), (got.out, *got.grads), truths, allowed, strict=True
        ):
            error = float((mine.double() - truth).square().mean().sqrt())
            limit = float((bad.double() - truth).square().mean().sqrt())
            assert error <= 2 * limit, (what, world, error, limit)
            errors.setdefault(what, []).append(error)
    for what, values in errors.items():
        assert max(values) <= 1.25 * values[0], (what, values)


def longspan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "longspan", *arguments], capture_output=True, text=True, timeout=150, check=False
    )


@pytest.mark.parametrize(("ranks", "shard"), [(1, "none"), (1, "zero3"), (2, "none"), (3, "none")])
def test_short_training_and_generation(ranks: int, shard: str, tmp_path: Path) -> None:
    """One rank uses NCCL; several ranks share the GPU through host memory."""
    out = tmp_path / "run"
    done = longspan(
        "train", "--ranks", str(ranks), "--out", str(out), "--batch.steps", "12", "--batch.tokens", "4096",
        "--batch.length", "2048", "--eval.contexts", "512", "2048", "--eval.tokens", "4096", "--plan.precision", "bf16",
        "--plan.shard", shard, "--plan.recompute", "attention", "--model.width", "128", "--model.heads", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    said = longspan("generate", str(out), "--prompt", "def ", "--max-new-tokens", "20", "--device", "cuda")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("def ")


def test_sharding_over_ranks_that_share_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("needs exactly one GPU")
    done = longspan("train", "--ranks", "2", "--out", str(tmp_path), "--plan.shard", "zero2")
    assert done.returncode == 2
    assert "cannot shard CUDA tensors" in done.stderr


@pytest.mark.parametrize("method", ["zigzag", "token_ring", "mask_aware", "kept_keys", "usp"])
def test_errors_do_not_grow_with_the_ranks(method: str) -> None:
    """2 to 64 emulated ranks in bf16 against float64: at most twice the single kernel's error, and flat."""
    s, h, g, d = 4160, 4, 2, 64
    mask = masks.causal(s)
    inputs = make_inputs(s, h=h, g=g, d=d, dtype=torch.bfloat16).to(torch.device("cuda"))
    exact = formula(inputs.to(torch.float64), mask.dense().cuda())
    settings = Settings(pick(inputs.q, softcap=None), d**-0.5, None)
    errors: dict[int, list[float]] = {}
    for world in (1, 2, 8, 64):
        layout = default_layout(mask, world, method)
        geometry = Geometry(mask, layout)
        schedule = prune_schedule(builder(method, world)(layout, h, g), geometry)
        got = emulate(schedule, geometry, *inputs[:3], settings, inputs.dout)
        assert got.grads is not None
        errors[world] = [
            float((mine.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())
            for mine, truth in zip((got.out, *got.grads), exact, strict=True)
        ]
    print(method, {world: [f"{e:.2e}" for e in row] for world, row in errors.items()})
    for world, row in errors.items():
        for mine, single in zip(row, errors[1], strict=True):
            assert mine <= 1.25 * single, (world, row, errors[1])
