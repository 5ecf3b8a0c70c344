"""Channel mixers, norms and the block that wires them with a token mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.layout.tensor_parallel import WHOLE, Linear, TensorSplit, linear_boxes
from longspan.layout.weights import Box
from longspan.mixers.contract import Context
from longspan.mixers.norm import PlusOneRMSNorm, RMSNorm
from longspan.mixers.rotary import Rotary
from longspan.mixers.softmax import Attention
from longspan.model.config import LayersConfig, MlpConfig, MlpKind, NormConfig
from longspan.model.moe import Moe, Routing
from longspan.model.part import ALL, ModelPart


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) with weight and bias; statistics in fp32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The normed input, in its own shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(config: NormConfig, size: int) -> nn.Module:
    """The norm a config asks for, over a last dim of `size`."""
    return {"rms": RMSNorm, "rms_plus_one": PlusOneRMSNorm, "layer": LayerNorm}[config.kind](size, config.eps)


def activation(kind: MlpKind, x: Tensor) -> Tensor:
    """The activation of a kind of mlp; of the gate, where it has one."""
    if kind == "swiglu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if kind == "gelu" else "tanh")


class Mlp(nn.Module):
    """The channel mixer: gated by silu or gelu (arXiv:2002.05202), or gelu by erf or by tanh (arXiv:1606.08415).

    `tile`, a runtime setting that no checkpoint holds: with a number, that many tokens of the sequence are mixed at a
    time and their inner activations are computed again in the backward, so that inner_size · tile values are alive at
    once and not inner_size · l. The result is the same; the forward of the mlp runs twice in training.
    """

    def __init__(self, config: MlpConfig, hidden_size: int, split: TensorSplit = WHOLE) -> None:
        super().__init__()
        self.config, self.split = config, split
        self.tile: int | None = None
        inner = len(split.share(config.inner_size))
        self.gate = Linear(hidden_size, inner, bias=config.bias) if config.gated else None
        self.up = Linear(hidden_size, inner, bias=config.bias)
        self.down = Linear(inner, hidden_size, bias=config.bias)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b m c"]:
        """Mixes the channels of every token alone; m is l unless the inner channels are split."""
        if self.tile is None or self.tile >= x.shape[1]:
            out = self._mix(x)
        elif not torch.is_grad_enabled():
            out = torch.cat([self._mix(tile) for tile in x.split(self.tile, dim=1)], dim=1)
        else:
            tiles = [checkpoint(self._mix, tile, use_reentrant=False) for tile in x.split(self.tile, dim=1)]
            out = torch.cat(tiles, dim=1)
        return self.split.total(out, self.down)

    def _mix(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            inner = activation(self.config.kind, self.gate(x)) * self.up(x)
        else:
            inner = activation(self.config.kind, self.up(x))
        return self.split.partial(inner, self.down)

    def boxes(self) -> dict[str, Box]:
        """Where the split parameters stand in the whole ones."""
        start, total = self.split.share(self.config.inner_size).start, self.config.inner_size
        boxes = linear_boxes("up", self.up, 0, start, total) | linear_boxes("down", self.down, 1, start, total)
        return boxes if self.gate is None else boxes | linear_boxes("gate", self.gate, 0, start, total)


def make_channel_mixer(config: LayersConfig, layer: int, part: ModelPart = ALL) -> Mlp | Moe:
    """The mlp or the mixture of experts of one layer."""
    mixer, width = config.channel_mixer(layer), config.hidden_size
    if isinstance(mixer, MlpConfig):
        return Mlp(mixer, width, part.split)
    shared = Mlp(MlpConfig(inner_size=mixer.shared_inner_size), width, part.split) if mixer.shared_inner_size else None
    return Moe(mixer, width, shared, part)


class Block(nn.Module):
    """One layer of a decoder or an encoder: token mixer and channel mixer, wired with their norms."""

    def __init__(self, config: LayersConfig, layer: int, rotary: Rotary | None, part: ModelPart = ALL) -> None:
        super().__init__()
        self.split, self.wiring, width = part.split, config.wiring, config.hidden_size
        self.norm_mixer = make_norm(config.norm, width)
        self.mixer = Attention(
            config.attention, width, layer=layer, window=config.window(layer), rotary=rotary, split=part.split
        )
        # Side by side, both read the one norm.
        self.norm_mlp = None if config.wiring == "parallel" else make_norm(config.norm, width)
        self.mlp = make_channel_mixer(config, layer, part)
        sandwich = config.wiring == "sandwich"
        self.norm_mixer_out = make_norm(config.norm, width) if sandwich else nn.Identity()
        self.norm_mlp_out = make_norm(config.norm, width) if sandwich else nn.Identity()

    def forward(self, x: Float[Tensor, "b m c"], ctx: Context) -> tuple[Float[Tensor, "b m c"], Routing | None]:
        """The layer's output, residuals added, and where tokens went (None where the layer has no experts); m is the
        context's number of tokens unless weights are split."""
        num_tokens, post = ctx.positions.shape[0], self.wiring == "post"
        normed = self.split.gather(x if post else self.norm_mixer(x), num_tokens)
        # The outer norms see the sum over ranks, which the mixers return.
        x = x + self.norm_mixer_out(self.mixer(normed, ctx))
        if post:
            x = self.norm_mixer(x)
        if self.norm_mlp is not None:
            normed = self.split.gather(x if post else self.norm_mlp(x), num_tokens)
        mixed = self.mlp(normed)
        mixed, routing = mixed if isinstance(self.mlp, Moe) else (mixed, None)
        x = x + self.norm_mlp_out(mixed)
        return self.norm_mlp(x) if post and self.norm_mlp is not None else x, routing
