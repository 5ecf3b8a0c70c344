"""Channel mixers, norms and the block that wires them with a token mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.mixers.contract import Context
from longspan.mixers.norm import PlusOneRMSNorm, RMSNorm
from longspan.mixers.rotary import Rotary
from longspan.mixers.softmax import Attention
from longspan.model.config import LayersConfig, MlpConfig, MlpKind, NormConfig


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

    def __init__(self, config: MlpConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.tile: int | None = None
        self.gate = nn.Linear(hidden_size, config.inner_size, bias=config.bias) if config.gated else None
        self.up = nn.Linear(hidden_size, config.inner_size, bias=config.bias)
        self.down = nn.Linear(config.inner_size, hidden_size, bias=config.bias)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        """Mixes the channels of every token alone."""
        if self.tile is None or self.tile >= x.shape[1]:
            return self._mix(x)
        if not torch.is_grad_enabled():
            return torch.cat([self._mix(tile) for tile in x.split(self.tile, dim=1)], dim=1)
        tiles = [checkpoint(self._mix, tile, use_reentrant=False) for tile in x.split(self.tile, dim=1)]
        return torch.cat(tiles, dim=1)

    def _mix(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(activation(self.config.kind, self.gate(x)) * self.up(x))
        return self.down(activation(self.config.kind, self.up(x)))


class Block(nn.Module):
    """One layer of a decoder or an encoder: token mixer and channel mixer, wired with their norms."""

    def __init__(self, config: LayersConfig, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.wiring = config.wiring
        self.norm_mixer = make_norm(config.norm, width)
        self.mixer = Attention(config.attention, width, layer=layer, window=config.window(layer), rotary=rotary)
        # Side by side, both read the one norm.
        self.norm_mlp = None if config.wiring == "parallel" else make_norm(config.norm, width)
        self.mlp = Mlp(config.mlp, width)
        self.norm_mixer_out = self.norm_mlp_out = None
        if config.wiring == "sandwich":
            self.norm_mixer_out, self.norm_mlp_out = make_norm(config.norm, width), make_norm(config.norm, width)

    def forward(self, x: Float[Tensor, "b l c"], ctx: Context) -> Float[Tensor, "b l c"]:
        """The layer's output, residuals added."""
        if self.wiring == "post":
            assert self.norm_mlp is not None
            x = self.norm_mixer(x + self.mixer(x, ctx))
            return self.norm_mlp(x + self.mlp(x))
        normed = self.norm_mixer(x)
        if self.norm_mlp is None:
            return x + self.mixer(normed, ctx) + self.mlp(normed)
        if self.norm_mixer_out is None or self.norm_mlp_out is None:
            x = x + self.mixer(normed, ctx)
            return x + self.mlp(self.norm_mlp(x))
        x = x + self.norm_mixer_out(self.mixer(normed, ctx))
        return x + self.norm_mlp_out(self.mlp(self.norm_mlp(x)))
