"""The kernel benchmark and the calibration on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from longspan.bench.attention_cell import Problem
from longspan.bench.calibrate import calibrate
from longspan.bench.contenders import CONTENDERS
from longspan.bench.kernel_cell import KernelCell, Task, measure

# Not errors here: torch's compiler warns of torch's own code, otherwise in each version.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
FULL_AND_CAUSAL = {"torch_flash", "torch_cudnn"}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("mask", ["causal", "full", "causal_document", "sliding_window_causal", "block_sparse"])
def test_every_kernel_is_exact_or_says_why_not(name: str, mask: str) -> None:
    problem = Problem(mask=mask, length=1536, heads=4, kv_heads=2, head_dim=64, dtype="bf16")
    sparse = {"block": 128, "ratio": 0.4} if mask == "block_sparse" else {}
    cell = KernelCell(task=Task(problem=problem, **sparse), kernel=name, device="gpu", threads=0)
    row = measure(cell, torch.device("cuda", 0), 3, 1280)
    full_or_causal = mask in ("full", "causal")
    old = torch.cuda.get_device_capability() < (9, 0)
    if name == "cpu_flash" or (name in FULL_AND_CAUSAL and not full_or_causal) or (name == "cudnn" and old):
        assert row["status"] == "refused", row
    elif name == "torch_cudnn" and row["status"] == "refused":
        assert "no such kernel" in row["reason"]  # not every version of it groups heads
    else:
        assert row["status"] == "ok", row
        assert row["added_bytes"] > 0


def test_a_quick_calibration() -> None:
    said: list[str] = []
    got = calibrate(
        torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, heads=8, kv_heads=8, head_dim=64,
        sizes=(512, 2048, 8192), copy_bytes=1 << 28, say=said.append,
    )  # fmt: skip
    assert got.median_error < 0.3, said
    assert 1e11 < got.profile.memory_bytes_per_s < 1e14
