"""Model FLOPs utilisation (MFU): the FLOPs that a step's model asks for, over those that its devices could do.

As PaLM defines it (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), but that attention counts the pairs which the
mask allows, as everywhere here (`longspan.model.cost`). Recomputation is not counted.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from longspan.attention import masks
from longspan.context.choose import preset_of
from longspan.context.sequence import windowed
from longspan.hardware.devices import device_name
from longspan.hardware.profile import make_profile
from longspan.model import cost
from longspan.model.config import DecoderConfig
from longspan.plan.plan import Plan, Precision
from longspan.train.precision import compute_dtype

# Cards of the same name with fewer or slower cores than the preset's, which is the SXM card.
_OTHER_CARDS = {"h100": {"PCIE", "NVL"}, "h200": {"NVL"}}


def peak_flop_per_s(name: str, preset: str, precision: Precision) -> float | None:
    """The nominal dense peak of a device by its name, None where it is not known: a CPU, another card."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if preset == "cpu" or preset.upper() not in words or words & _OTHER_CARDS.get(preset, set()):
        return None
    return make_profile(preset).peak(str(compute_dtype(precision)).removeprefix("torch."))


class Utilisation:
    """The MFU of steps of a run.

    Args:
        plan: with its precision resolved.
        known: False where a step's FLOPs are not those of the model, or ranks share a device.
    """

    def __init__(self, decoder: DecoderConfig, plan: Plan, device: torch.device, *, world: int, known: bool) -> None:
        self.decoder, self.world = decoder, world
        self.peak = None
        if known and device.type == "cuda":
            self.peak = peak_flop_per_s(device_name(device), preset_of(device), plan.precision)

    def of(self, tokens_per_s: float, length: int) -> dict[str, float]:
        """{"mfu": share of the peak} at a rate over all ranks, of rows of one length; {} where it is not known."""
        if self.peak is None:
            return {}
        return {"mfu": tokens_per_s * flops_a_token(self.decoder, length) / (self.world * self.peak)}


@lru_cache(maxsize=64)
def flops_a_token(decoder: DecoderConfig, length: int) -> float:
    """FLOPs of a token's forward and backward, the mean of a causal row."""
    mask = masks.causal(length)
    windows = [decoder.window(layer) for layer in range(decoder.num_layers)]
    areas = {window: mask.area if window is None else windowed(mask, window).area for window in set(windows)}
    forward = cost.flops(decoder, length, [areas[window] for window in windows], backward=False)
    return 3 * sum(forward.values()) / length  # a backward that computes no scores again is twice the forward
