"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + b + scaling · B A x with W and b frozen, A and B trained.

scaling is alpha / rank as in the paper (section 4.1), or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). B
starts at 0; A as PEFT starts it, uniform within ±1 / sqrt(inputs), where the paper says Gaussian.

Cost of a matrix of (out, in): rank · (in + out) trained values, 6 · rank · (in + out) FLOPs a token in training; the
frozen matrix needs no gradient and no optimiser state, 12 bytes a value less in fp32 AdamW.

Tensor ranks split an adapter as its matrix: with the outputs B, with the inputs A. The other is whole on every rank,
computes there for all tokens, and its gradient is a partial sum, as of all that tensor ranks hold whole; B A x is
reduced with W x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.layout.tensor_parallel import Linear
from longspan.layout.weights import Box, along
from longspan.mixers.config import require
from longspan.model.decoder import DecoderLM
from longspan.model.shards import Region, drawn, fill, is_sharded

# Ours by the short name, within a block.
TARGETS = {
    "q": "mixer.q",
    "k": "mixer.k",
    "v": "mixer.v",
    "out": "mixer.out",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}
_ADAPTERS = (".lora_a", ".lora_b")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights.

    Args:
        rank: inner width of an adapter; 0 for no adapters.
        alpha: an adapter's output is scaled by alpha / rank.
        dropout: must be 0.
        targets: the matrices that get one, of every layer.
        rslora: scale by alpha / sqrt(rank) instead.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(TARGETS)
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora rank must be 0 or more", self.rank, "8 is usual, 0 is none")
        require(self.alpha > 0, "lora alpha must be positive", self.alpha, "16 is usual")
        require(self.dropout == 0, "lora dropout must be 0", self.dropout, "leave it out")
        known = bool(self.targets) and len(set(self.targets)) == len(self.targets) and set(self.targets) <= set(TARGETS)
        require(known, f"lora targets must be some of {', '.join(TARGETS)}, each once", self.targets, "pick of these")
        plain = (self.alpha, self.targets, self.rslora) == (16.0, tuple(TARGETS), False)
        require(self.rank > 0 or plain, "lora options need a lora rank", self.rank, "give it, or leave them out")

    @property
    def scaling(self) -> float:
        """What an adapter's output is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear(Linear):
    """A linear layer with frozen weights and an adapter beside them. Parameters of the layer keep their names."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        num_out, num_in = base.weight.shape
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight, self.bias, self.scaling = base.weight, base.bias, config.scaling
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, num_in))
        self.lora_b = nn.Parameter(base.weight.new_empty(num_out, config.rank))

    def forward(
        self, x: Float[Tensor, "... i"], rows: slice | None = None, *, with_bias: bool = True
    ) -> Float[Tensor, "... o"]:
        """The layer's output with the adapter's added."""
        adapted = F.linear(F.linear(x, self.lora_a), self.lora_b if rows is None else self.lora_b[rows])
        return super().forward(x, rows, with_bias=with_bias) + adapted * self.scaling

    def boxes(self, dim: int, start: int, total: int) -> dict[str, Box]:
        """As of the layer; of the adapter, B is split with the outputs and A with the inputs."""
        name, parameter = ("lora_b", self.lora_b) if dim == 0 else ("lora_a", self.lora_a)
        return super().boxes(dim, start, total) | {name: along(tuple(parameter.shape), dim, start, total)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith(_ADAPTERS)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def apply_lora(model: DecoderLM, config: LoraConfig) -> None:
    """Gives the targets adapters and freezes all else, in place. The adapters hold nothing yet: see `init_lora`.

    The model may be on the meta device; shard it afterwards.

    Raises:
        ValueError: rank 0, a model with adapters or with sharded parameters, or a target that its layers do not have.
    """
    require(config.rank > 0, "adapters need a lora rank of at least 1", config.rank, "8 is usual")
    require(not adapted_layers(model), "a model takes adapters once", "adapters on it already", "merge them first")
    require(not is_sharded(model), "adapters come before sharding", "DTensor parameters", "apply, then shard")
    found: list[tuple[nn.Module, str, Any]] = []
    for layer, block in model.blocks.named_children():
        for target in config.targets:
            parent, _, leaf = TARGETS[target].rpartition(".")
            holder = block.get_submodule(parent)
            found.append((holder, leaf, getattr(holder, leaf, None)))
            require(
                isinstance(found[-1][2], Linear),
                f"lora targets must be layers of the model, but layer {layer} has no {target}",
                config.targets,
                f"leave {target} out",
            )
    for holder, leaf, base in found:
        setattr(holder, leaf, LoraLinear(base, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def init_lora(model: DecoderLM, seed: int) -> None:
    """Fills all adapters, sharded, split or not: B 0, A uniform within ±1 / sqrt(inputs), a function of (seed,
    parameter name) alone, as in `init_weights`."""
    boxes = model.boxes()
    for name, layer in adapted_layers(model).items():
        a, b = f"{name}.lora_a", f"{name}.lora_b"
        columns = boxes[a].shape[1] if a in boxes else layer.lora_a.shape[1]
        fill(layer.lora_a, lambda region, a=a, c=columns: _uniform(seed, a, region, c), boxes.get(a))
        fill(layer.lora_b, lambda region: torch.zeros(tuple(part.stop - part.start for part in region)), boxes.get(b))


def _uniform(seed: int, name: str, region: Region, num_columns: int) -> Tensor:
    values = drawn(seed, name, region, num_columns, lambda shape, g: torch.rand(shape, generator=g))
    return values.mul_(2).sub_(1).mul_(num_columns**-0.5)


@torch.no_grad()
def merge_lora(model: DecoderLM) -> None:
    """Adds every adapter to its frozen weight and takes it away, in place; all parameters are trainable again.

    Raises:
        ValueError: sharded parameters.
    """
    require(not is_sharded(model), "adapters are merged into whole weights", "DTensor parameters", "export the adapter")
    for name, layer in adapted_layers(model).items():
        num_out, num_in = layer.weight.shape
        plain = Linear(num_in, num_out, bias=False, device="meta")
        plain.weight = nn.Parameter(merged(layer.weight, layer.lora_a, layer.lora_b, layer.scaling))
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    model.requires_grad_(True)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """weight + scaling · B A, computed in fp32 at least and rounded once, in the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + (b.to(wide) @ a.to(wide)) * scaling).to(weight.dtype)
