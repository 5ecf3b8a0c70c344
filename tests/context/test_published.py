"""The simulator against published ratios that nothing here was fitted to. Where it fails, the reason is in the test.

Fitted were: kernel efficiencies, to speeds of single kernels and of one rank's share on an H200; the rate of one PCIe
message, to the ring's step on four A10.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest

from longspan.attention import masks
from longspan.attention.patterns import sample_lengths
from longspan.context.costs import shapes
from longspan.context.schedule import Sizes
from longspan.context.simulate import simulate
from longspan.hardware.profile import Shape, make_profile
from longspan.hardware.topology import make_topology
from tests.context.simulated import pruned
from tests.data import data_dir

WITHIN = 0.15
S, P, D = 65536, 8, 128


@lru_cache(maxsize=32)
def time_s(name: str, causal: bool, heads: tuple[int, int], device: str, topology: str, backward: bool) -> float:
    mask = masks.causal(S) if causal else masks.full(S)
    schedule, geometry = pruned(name, mask, P, *heads)
    wires = make_topology(topology, P)
    return simulate(schedule, geometry, wires, make_profile(device), Sizes(head_dim=D), backward=backward).time_s


def ideal_s(backward: bool) -> float:
    """An eighth of one kernel's time, FlashAttention-2 on Hopper, 32 heads."""
    device = make_profile("h100_flash")
    calls = shapes(masks.causal(S).bands, device.kernel)
    return device.kernel_s(calls, heads=32, head_dim=D, dtype="bfloat16", backward=backward) / P


@pytest.mark.parametrize(
    ("name", "forward", "both"), [("ring", 0.52, 0.54), ("zigzag", 0.85, 0.90), ("striped", 0.74, 0.83)]
)
def test_ring_flash_attention_s_share_of_the_ideal(name: str, forward: float, both: float) -> None:
    # README of zhuzilin/ring-flash-attention: 8 x H800, Llama-3.1-8B's heads, 8K tokens a GPU.
    times = [time_s(name, True, (32, 8), "h100_flash", "h800", backward) for backward in (False, True)]
    assert ideal_s(False) / times[0] == pytest.approx(forward, rel=WITHIN)
    assert (ideal_s(False) + ideal_s(True)) / sum(times) == pytest.approx(both, rel=WITHIN)


def ring_against_ulysses(causal: bool, backward: bool = False) -> float:
    """Speeds of MagiAttention's comparison (8 x H100, 64 : 8 heads, 8K tokens a GPU); its ring is zigzag."""
    ring, other = (time_s(name, causal, (64, 8), "h100", "h100", backward) for name in ("zigzag", "ulysses"))
    return other / ring


def test_ring_against_ulysses_on_a_full_mask() -> None:
    assert ring_against_ulysses(causal=False) == pytest.approx(0.84, rel=WITHIN)


@pytest.mark.xfail(
    reason="0.82 against 0.70 forward, 0.86 against 0.74 backward. Their kernel is faster than the cuDNN that was "
    "measured here, so overheads weigh more; the rest is probably how their ring merges (not looked into)"
)
@pytest.mark.parametrize(("backward", "published"), [(False, 421 / 601), (True, 432 / 582)])
def test_ring_against_ulysses_on_a_causal_mask(backward: bool, published: float) -> None:
    assert ring_against_ulysses(causal=True, backward=backward) == pytest.approx(published, rel=WITHIN)


def test_the_order_of_methods_on_nvlink() -> None:
    # Published, full and causal: Ulysses and the all-gather first, then USP, the ring clearly last.
    for causal in (False, True):
        times = {
            n: time_s(n, causal, (64, 8), "h100", "h100", False) for n in ("ulysses", "all_gather", "usp", "zigzag")
        }
        assert max(times["ulysses"], times["all_gather"]) < times["usp"] < times["zigzag"]


def test_token_ring_s_steps_on_four_a10() -> None:
    # arXiv:2412.20501: 4 x A10 on PCIe, S = 24,000, 32 heads, outputs in 16 bits; ring 7.6 ms a step, TokenRing
    # 3.5 / 3.5 / 4.6 ms. These are times of messages: attention on 6,000 x 6,000 tokens alone takes an A10 8 ms.
    def steps(name: str) -> list[float]:
        schedule, geometry = pruned(name, masks.full(24000), 4, 32, 32)
        sizes = Sizes(head_dim=D, sums=2)
        got = simulate(schedule, geometry, make_topology("a10_pcie", 4), make_profile("a10"), sizes)
        sends = [event for event in got.events if event.kind == "send"]
        by_step = [[e for e in sends if e.step == step] for step in range(3)]
        return [max(e.stop_s for e in some) - min(e.start_s for e in some) for some in by_step]

    ring, token_ring = steps("zigzag"), steps("token_ring")
    assert ring == pytest.approx([7.6e-3] * 3, rel=0.02)  # fitted
    assert token_ring == pytest.approx([3.5e-3, 3.5e-3, 4.6e-3], rel=WITHIN)
    assert ring[0] / token_ring[0] == pytest.approx(7.6 / 3.5, rel=WITHIN)


@lru_cache(maxsize=2)
def ring_on_documents_flop_per_s(world: int) -> float:
    """Forward speed of a ring that deals every document out to all ranks in zigzag and packs their parts in one call.

    Priced from the profile: as a schedule it would have 1,000 stretches a rank. Mean over 16 sets of documents.
    """
    device = dataclasses.replace(make_profile("h100"), packed=True)
    lengths_file = data_dir("longca") / "prolong64k.json"
    topology = make_topology("h100", world)
    slowest = min(topology.resources[wire].bytes_per_s for wire in topology.route(world - 1, 0))
    speeds = []
    for seed in range(16):
        documents = sample_lengths(lengths_file, 8192 * world, seed)
        parts = [max(1, -(-length // (2 * world))) for length in documents]  # tokens of half a rank's share
        own = [Shape(2 * n, 2 * n, n * (2 * n + 1), 1) for n in parts]
        other = [Shape(2 * n, n, 2 * n * n) for n in parts]
        kernels = [device.kernel_s(s, heads=64, head_dim=D, dtype="bfloat16") for s in (own, other)]
        merging = device.traffic_s(8192 * 64 * D * (6 + 12)) + device.block_s
        hop = 2 * 8192 * 8 * D * 2 / slowest
        total_s = kernels[0] + merging + (world - 1) * max(kernels[1] + merging, hop)
        speeds.append(sum(n * (n + 1) / 2 for n in documents) * 4 * 64 * D / world / total_s)
    return sum(speeds) / len(speeds)


def test_the_ring_collapses_on_documents() -> None:
    # Published 89 TFLOP/s a GPU at 8, 28 at 64.
    assert ring_on_documents_flop_per_s(64) < 0.4 * ring_on_documents_flop_per_s(8)
    assert ring_on_documents_flop_per_s(64) == pytest.approx(28e12, rel=0.25)


@pytest.mark.xfail(
    reason="136 TFLOP/s at 8 GPUs against 89, and 29 at 64 against 28: the speed hangs on the documents, which are not "
    "published (22 to 170 over our draws at 8), and their kernel halves on documents (Ulysses 278 against 601 causal)"
)
def test_how_far_the_ring_collapses_on_documents() -> None:
    assert ring_on_documents_flop_per_s(64) / ring_on_documents_flop_per_s(8) == pytest.approx(28 / 89, rel=WITHIN)
