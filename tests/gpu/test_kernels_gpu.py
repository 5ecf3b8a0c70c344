"""Kernels on a CUDA device against the dense formula in float64. Run: pytest -m gpu tests/gpu."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longspan.attention import masks
from longspan.attention.bands import Bands, cut, shift
from longspan.attention.kernels import KERNELS, pick
from longspan.attention.kernels.contract import row_sums
from longspan.attention.merge import merge, merge_, merge_into
from tests.attention.kernels.blocks import MASKS, RANGES, Inputs, block, errors, oracle, plain_errors, run, tensors
from tests.attention.test_merge import merged_one_by_one, placed_parts

# Not errors here: torch's compiler warns of torch's own code, otherwise in each version.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CUDA = ["cudnn", "cuda_flash", "flex"]
FLEX_SMALL = [(torch.bfloat16, "causal"), (torch.float16, "window_both")]
# Large enough for full, causal and window calls of cuDNN's plan, on odd sizes.
LARGE = {
    "causal": masks.causal(1031),
    "documents": masks.documents([300, 1, 17, 713]),
    "window": masks.sliding_window(1031, 200, 0),
    "window_both": masks.sliding_window(1031, 130, 61),
    "prefix": masks.prefix_lm(1031, 400),
}


def limit(plain: float, one_key: bool = False) -> float:
    """Twice the plain formula's error; see the same function in tests/attention/kernels/test_kernels.py."""
    return max(2 * plain, 1e-2 if one_key else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("mask", MASKS)
def test_small_blocks(name: str, mask: str, dtype: torch.dtype) -> None:
    if name == "flex" and (dtype, mask) not in FLEX_SMALL:
        pytest.skip("flex compiles a graph for every shape: a few masks stand for all")
    for ranges in RANGES:
        bands, num_q, num_k = block(mask, ranges)
        for h, g in ((4, 2),) if name == "flex" else ((4, 4), (4, 2), (4, 1)):
            compare(
                name, tensors(num_q, num_k, h, g, d=64, b=4, dtype=dtype, device="cuda"), bands, mask == "self_only"
            )


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("mask", LARGE)
def test_large_blocks(name: str, mask: str, d: int) -> None:
    if name == "flex" and (d, mask) not in ((64, "prefix"), (128, "documents")):
        pytest.skip("flex compiles a graph for every shape: a few masks stand for all")
    for q, k in (((0, 1031), (0, 1031)), ((515, 1031), (100, 900))):
        bands = shift(cut(LARGE[mask].bands, q, k), -q[0], -k[0])
        inputs = tensors(q[1] - q[0], k[1] - k[0], 4, 2, d=d, b=1, dtype=torch.bfloat16, device="cuda")
        compare(name, inputs, bands)


def compare(name: str, inputs: Inputs, bands: Bands, one_key: bool = False) -> None:
    scale = inputs[0].shape[-1] ** -0.5
    truth = oracle(*inputs, bands, scale=scale)
    found = errors(run(KERNELS[name](), *inputs, bands, truth, scale=scale), truth)
    allowed = plain_errors(*inputs, bands, truth, scale=scale)
    for what in ("out", "dq", "dk", "dv"):
        assert found[what] <= limit(allowed[what], one_key), what
    assert found["lse"] < 1e-4


@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("mask", ["causal", "documents", "window_both"])
def test_blocks_of_keys_add_up_to_the_whole(name: str, mask: str) -> None:
    kernel, bands, num = KERNELS[name](), LARGE[mask].bands, 1031
    q, k, v, dout = tensors(num, num, 4, 2, d=64, b=1, dtype=torch.bfloat16, device="cuda")
    truth = oracle(q, k, v, dout, bands, scale=0.125)
    edges = [0, 300, 310, num]
    parts = [(slice(a, b), shift(cut(bands, (0, num), (a, b)), 0, -a)) for a, b in pairwise(edges)]
    out, lse = merge(kernel.forward(q, k[:, s], v[:, s], local, scale=0.125, softcap=None) for s, local in parts)
    delta = row_sums(dout, out)
    dq, dk, dv = torch.zeros_like(out), [], []
    for s, local in parts:
        grads = kernel.backward(dout, q, k[:, s], v[:, s], lse, delta, local, scale=0.125, softcap=None)
        dq += grads[0]
        dk.append(grads[1])
        dv.append(grads[2])
    got = {"out": out, "lse": lse, "dq": dq, "dk": torch.cat(dk, 1), "dv": torch.cat(dv, 1)}
    found = errors({what: x.double().cpu().numpy() for what, x in got.items()}, truth)
    allowed = plain_errors(q, k, v, dout, bands, truth, scale=0.125)
    for what in ("out", "dq", "dk", "dv"):
        assert found[what] <= limit(allowed[what]), what


@pytest.mark.parametrize("name", [name for name in CUDA if name != "cudnn"])  # which is passed over then
@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_torchs_switch_makes_results_bit_identical(name: str, mask: str) -> None:
    kernel, bands, num = KERNELS[name](), LARGE[mask].bands, 1031
    q, k, v, dout = tensors(num, num, 4, 2, d=64, b=1, dtype=torch.bfloat16, device="cuda")

    def once() -> list[torch.Tensor]:
        out, lse = kernel.forward(q, k, v, bands, scale=0.125, softcap=None)
        grads = kernel.backward(dout, q, k, v, lse, row_sums(dout, out), bands, scale=0.125, softcap=None)
        return [out, lse, *grads]

    torch.use_deterministic_algorithms(True)
    try:
        first = once()
        for _ in range(9):
            assert all(torch.equal(x, y) for x, y in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", ["causal", "window", "global_window"])
def test_flex_in_float32_and_inside_a_custom_op(mask: str, softcap: float | None) -> None:
    bands, num_q, num_k = block(mask, "square")
    inputs = tensors(num_q, num_k, 4, 2, d=32, dtype=torch.float32, device="cuda")
    truth = oracle(*inputs, bands, scale=0.3, softcap=softcap)
    kernel = pick(inputs[0], softcap=softcap)
    assert kernel.name == "flex"
    found = errors(run(kernel, *inputs, bands, truth, scale=0.3, softcap=softcap), truth)
    assert max(found.values()) < 1e-4
    lse, delta = (torch.from_numpy(x).to("cuda", torch.float32) for x in (truth.lse, truth.delta))

    @torch.library.custom_op("longspan_test::flex_backward", mutates_args=())
    def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        return kernel.backward(dout, q, k, v, lse, delta, bands, scale=0.3, softcap=softcap)[0]

    torch.testing.assert_close(backward(*inputs).double().cpu(), torch.from_numpy(truth.dq), rtol=0, atol=1e-3)


def test_the_choice_on_cuda() -> None:
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    first = "cudnn" if torch.cuda.get_device_capability() >= (9, 0) else "cuda_flash"
    assert pick(q, softcap=None).name == first
    assert pick(q.repeat(1, 1, 1, 4), softcap=None).name == "cuda_flash"
    assert pick(q, softcap=30.0).name == "flex"
    assert pick(q.float(), softcap=None).name == "flex"
    assert pick(q.double(), softcap=None).name == "reference"


def test_reference_runs_on_the_device() -> None:
    bands, num_q, num_k = block("odd", "square")
    inputs = tensors(num_q, num_k, 4, 2, device="cuda")
    truth = oracle(*inputs, bands, scale=0.3)
    assert max(errors(run(KERNELS["reference"](), *inputs, bands, truth, scale=0.3), truth).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [2, 3, 4, 5, 9])
def test_placed_parts_merge_in_one_pass(dtype: torch.dtype, num: int) -> None:
    for seed in range(10):
        parts = placed_parts(num, seed, dtype, "cuda")
        parts[1].lse[0, 0, 0] = torch.nan
        expected = merged_one_by_one(parts)
        for target in (torch.float32, dtype):
            out, lse = torch.full((2, 9, 4, 8), 7.0, device="cuda", dtype=target), torch.full((2, 4, 9), 7.0).cuda()
            merge_into(out, lse, parts)
            tolerance = 2e-6 if target == torch.float32 else 2.0**-7
            torch.testing.assert_close(out.double().cpu(), expected[0], rtol=tolerance, atol=2e-6, equal_nan=True)
            torch.testing.assert_close(lse.double().cpu(), expected[1], rtol=2e-6, atol=2e-6, equal_nan=True)
        if dtype == torch.float32:
            merge_into(parts[0].out, parts[0].lse, parts)
            torch.testing.assert_close(parts[0].out, out, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "heads", "d"), [(1, 1, 1), (37, 3, 64), (129, 2, 96), (1000, 4, 256)])
def test_merge_in_one_pass_is_the_torch_merge(dtype: torch.dtype, length: int, heads: int, d: int) -> None:
    draw = torch.Generator("cuda").manual_seed(length)

    def part(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.randn(2, length + 3, heads + 1, d, generator=draw, device="cuda").to(kind)
        lse = 9 * torch.randn(2, heads + 1, length + 3, generator=draw, device="cuda")
        lse[torch.rand(lse.shape, generator=draw, device="cuda") < 0.3] = -torch.inf
        return out.mul_((lse > -torch.inf).transpose(1, 2)[..., None]), lse

    out, lse = part(torch.float32)
    new_out, new_lse = part(dtype)
    lse[1, 0, 2] = torch.nan
    expected = [x.double().cpu() for x in (out, lse)]
    inside = slice(1, length + 1), slice(1, heads + 1)  # views, and what is around them
    views = [x[:, inside[0], inside[1]] for x in (out, expected[0], new_out)]
    lses = [x[:, inside[1], inside[0]] for x in (lse, expected[1], new_lse)]
    merge_(views[1], lses[1], views[2].double().cpu(), lses[2].double().cpu())
    merge_(views[0], lses[0], views[2], lses[2])
    for mine, truth in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), truth, rtol=2e-6, atol=2e-6, equal_nan=True)
