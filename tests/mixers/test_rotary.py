"""Rotary positions against the papers' formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longspan.mixers.config import LinearScaling, Llama3Scaling, RopeScaling, RotaryConfig, YarnScaling
from longspan.mixers.rotary import Rotary, inverse_frequencies, rotate
from tests.oracles import rotary as oracle

D, THETA = 26, 731.0
PAIRS = range(D // 2)
SCALINGS: dict[str, tuple[RopeScaling | None, list[float], float]] = {
    "none": (None, [oracle.frequency(j, D, THETA) for j in PAIRS], 1.0),
    "linear": (LinearScaling(factor=3.0), [oracle.linear(j, D, THETA, 3.0) for j in PAIRS], 1.0),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_positions=97),
        [oracle.llama3(j, D, THETA, 8.0, 1.5, 5.0, 97) for j in PAIRS],
        1.0,
    ),
    "yarn": (
        YarnScaling(factor=5.0, original_max_positions=211, beta_fast=16.0, beta_slow=2.0),
        [oracle.yarn(j, D, THETA, 5.0, 16.0, 2.0, 211) for j in PAIRS],
        0.1 * math.log(5.0) + 1,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_follow_the_papers(name: str) -> None:
    scaling, expected, factor = SCALINGS[name]
    inv_freq, got_factor = inverse_frequencies(RotaryConfig(theta=THETA, scaling=scaling), D)
    torch.testing.assert_close(inv_freq.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-12)
    # The cases bite: each scaling differs from none, and the ones by parts keep some pairs and stretch others.
    plain = torch.tensor(SCALINGS["none"][1], dtype=torch.float64)
    ratio = plain / torch.tensor(expected, dtype=torch.float64)
    if name in ("llama3", "yarn"):
        assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(scaling.factor)  # pyright: ignore[reportOptionalMemberAccess]
        assert ((ratio > 1.01) & (ratio < ratio[-1] - 0.01)).any()


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation(name: str) -> None:
    scaling, expected, factor = SCALINGS[name]
    positions = torch.tensor([0, 1, 2, 0, 1, 257, 1000])
    x = torch.randn(2, 7, 3, D, dtype=torch.float64)
    cos, sin = Rotary(RotaryConfig(theta=THETA, scaling=scaling), D).angles(positions, x.dtype)
    got = rotate(x, cos, sin)
    want = np.stack(
        [[oracle.rotate(x[b, :, h].numpy(), positions.numpy(), expected) for h in range(3)] for b in range(2)]
    )
    torch.testing.assert_close(got, factor * torch.from_numpy(want).transpose(1, 2), rtol=0, atol=2e-3)
    early = positions < 3
    torch.testing.assert_close(
        got[:, early], factor * torch.from_numpy(want).transpose(1, 2)[:, early], rtol=0, atol=2e-6
    )


def test_low_precision_rotates_in_fp32() -> None:
    # In bf16 position 257 would be 256, a turn wrong by a whole radian in the first pair.
    rotary = Rotary(RotaryConfig(theta=THETA), D)
    x = torch.randn(1, 1, 1, D).bfloat16()
    exact = rotate(x.double(), *rotary.angles(torch.tensor([257]), torch.float64))
    got = rotate(x, *rotary.angles(torch.tensor([257]), x.dtype))
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 0.02
    wrong = rotate(x.double(), *rotary.angles(torch.tensor([256]), torch.float64))
    assert (wrong - exact).abs().max() > 0.2


def test_scores_depend_on_distance_alone_and_gradients_are_right() -> None:
    rotary = Rotary(RotaryConfig(theta=THETA), 6)
    q, k = (torch.randn(1, 1, 1, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def score(q: torch.Tensor, k: torch.Tensor, at: int, to: int) -> torch.Tensor:
        turn = lambda x, p: rotate(x, *rotary.angles(torch.tensor([p]), x.dtype))  # noqa: E731
        return (turn(q, at) * turn(k, to)).sum()

    assert score(q, k, 7, 3).item() == pytest.approx(score(q, k, 24, 20).item(), rel=1e-12)
    assert score(q, k, 7, 3).item() != pytest.approx(score(q, k, 7, 4).item(), rel=1e-3)
    assert torch.autograd.gradcheck(lambda q, k: score(q, k, 5, 2), (q, k))


def test_frequencies_made_in_inference_mode_serve_training() -> None:
    rotary = Rotary(RotaryConfig(), 4)
    x = torch.randn(1, 3, 1, 4, requires_grad=True)
    with torch.inference_mode():
        rotate(x, *rotary.angles(torch.arange(3), x.dtype))
    rotate(x, *rotary.angles(torch.arange(3), x.dtype)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearScaling(factor=0.5), "factor >= 1, got 0.5"),
        (
            lambda: Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0),
            r"low_freq_factor < high.*\(4.0, 1.0\)",
        ),
        (lambda: YarnScaling(factor=2.0, original_max_positions=0), "original_max_positions must be positive, got 0"),
        (lambda: YarnScaling(factor=2.0, original_max_positions=9, beta_fast=1.0), "beta_fast > beta_slow"),
        (lambda: RotaryConfig(theta=0.0), "theta must be > 1"),
    ],
)
def test_settings_without_meaning_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
