"""A decoder language model from parts: made on the meta device, filled shard by shard, run whole or split."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from longspan.mixers.config import RotaryConfig
from longspan.mixers.contract import Context
from longspan.mixers.norm import PlusOneRMSNorm
from longspan.mixers.rotary import Rotary
from longspan.model.config import DecoderConfig
from longspan.model.local import LocalContext
from longspan.model.loss import chunked_cross_entropy
from longspan.model.parts import Block, Mlp, make_norm
from longspan.model.shards import Region, fill

if TYPE_CHECKING:
    from longspan.model.encoder import Encoder

_ROWS_PER_DRAW = 64


class DecoderLM(nn.Module):
    """Embedding, `blocks`, last norm and head.

    Every entry takes a `Context`; None stands for one process that holds whole rows, causal. Under FSDP2 only `forward`
    runs the hooks that
    gather weights: a caller of `hidden` or `loss` registers them with
    `torch.distributed.fsdp.register_fsdp_forward_method`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = config.positions
        learned = not isinstance(positions, RotaryConfig)
        self.embed_positions = nn.Embedding(positions.max_positions, config.hidden_size) if learned else None
        rotary = None if learned else Rotary(positions, config.attention.head_dim)
        windowed = rotary
        if config.windowed_positions is not None:
            windowed = Rotary(config.windowed_positions, config.attention.head_dim)
        self.blocks = nn.ModuleList(
            Block(config, layer, rotary if config.window(layer) is None else windowed)
            for layer in range(config.num_layers)
        )
        self.norm = make_norm(config.norm, config.hidden_size)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Float[Tensor, "vocab c"]:
        """The matrix of the head, which is the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def mlp_tile(self) -> int | None:
        """Tokens of the sequence that an mlp mixes at a time, None for all: a runtime setting, see `parts.Mlp`."""
        return self._mlps()[0].tile

    @mlp_tile.setter
    def mlp_tile(self, tile: int | None) -> None:
        if tile is not None and tile < 1:
            raise ValueError(f"mlp_tile must be positive or None, got {tile}: 4096 tokens is a good start")
        for mlp in self._mlps():
            mlp.tile = tile

    def _mlps(self) -> list[Mlp]:
        return [module for module in self.modules() if isinstance(module, Mlp)]

    def forward(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l vocab"]:
        """Logits of every local token."""
        return self.logits(self.hidden(input_ids, ctx))

    def logits(self, hidden: Float[Tensor, "... c"]) -> Float[Tensor, "... vocab"]:
        """The head on states that `hidden` gave, capped where the config says so."""
        logits, softcap = F.linear(hidden, self.head_weight), self.config.final_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def hidden(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l c"]:
        """States after the last norm.

        Raises:
            ValueError: ids of a wrong shape, dtype or range (the range on a CPU only; a GPU asserts in its gather), or
                positions beyond the learned ones.
        """
        self._check_ids(input_ids)
        if ctx is None:
            ctx = LocalContext(input_ids.shape[1], input_ids.device)
        if ctx.positions.shape != input_ids.shape[1:]:
            raise ValueError(
                f"a context must have a position for each local token, got {tuple(ctx.positions.shape)} positions for "
                f"{input_ids.shape[1]} tokens: pass the rank's own shard of the sequence"
            )
        x = self.embed(input_ids)
        if self.config.embed_scale is not None:
            x = x * _rounded(self.config.embed_scale, x.dtype)
        if self.embed_positions is not None:
            self._check_positions(ctx.positions)
            x = x + self.embed_positions(ctx.positions)
        for block in self.blocks:
            x = block(x, ctx)
        return self.norm(x)

    def loss(
        self,
        input_ids: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"],
        ctx: Context | None = None,
        *,
        chunk_tokens: int = 1024,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Summed cross-entropy (nats, fp32) over local labels but -100, and their number; full logits never exist."""
        return chunked_cross_entropy(
            self.hidden(input_ids, ctx),
            self.head_weight,
            labels,
            chunk_tokens=chunk_tokens,
            softcap=self.config.final_softcap,
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be integers of shape (b, l), got {input_ids.dtype} of {tuple(input_ids.shape)}: "
                "add a batch dim"
            )
        if _readable(input_ids) and input_ids.numel():
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must lie in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high}: "
                    "is the tokenizer's vocabulary larger than the model's?"
                )

    def _check_positions(self, positions: Tensor) -> None:
        limit = self.config.positions.max_positions
        if _readable(positions) and positions.numel() and int(positions.max()) >= limit:
            raise ValueError(
                f"learned positions end at {limit - 1}, got {int(positions.max())}: cut the sequence to {limit} tokens"
            )


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` holds it: in bf16 the factor √3072 is 55.5. In plain numbers, which cost no operation."""
    fraction, exponent = math.frexp(value)
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(fraction, digits)), exponent - digits)


def _readable(x: Tensor) -> bool:
    # A GPU would have to wait for its values, and a traced or fake tensor has none.
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def build(
    config: DecoderConfig,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DecoderLM:
    """A model of `config`. On "meta" it has shapes only: shard it, `model.to_empty(device=...)`, then `init_weights` or
    `load_into`.

    On any other device it comes initialised with `seed`.
    """
    with torch.device("meta"):
        model = DecoderLM(config).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def init_weights(model: DecoderLM | Encoder, seed: int) -> None:
    """Fills all parameters, sharded or not: weights N(0, init_std²), smaller back into the residual stream, biases
    0, norms such that their factor is 1.

    The values depend on (seed, parameter name) alone, not on sharding, ranks, device or the order of parameters: every
    64 rows of a weight have a CPU generator of their own, seeded by a hash of (seed, name, first row), drawn in fp32. A
    rank draws only the row groups that its shard touches (of a weight split along columns, all row groups, one at a
    time).

    Raises:
        ValueError: parameters on the meta device.
    """
    std = model.config.init_std
    plus_one = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, PlusOneRMSNorm)}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name in plus_one:
            fill(parameter, lambda region: torch.zeros(_shape(region)))
        elif parameter.ndim == 1:
            fill(parameter, lambda region: torch.ones(_shape(region)))
        else:
            residual = name.endswith(("mixer.out.weight", "mlp.down.weight"))
            scale = std / (2 * model.config.num_layers) ** 0.5 if residual else std
            columns = parameter.shape[1]
            fill(parameter, lambda region, n=name, s=scale, c=columns: _draw(seed, n, region, c, s))


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(r.stop - r.start for r in region)


def _draw(seed: int, name: str, region: Region, num_columns: int, std: float) -> Tensor:
    rows, columns = region
    out = torch.empty(_shape(region))
    first = rows.start - rows.start % _ROWS_PER_DRAW
    for start in range(first, rows.stop, _ROWS_PER_DRAW):
        digest = hashlib.blake2b(f"{seed}/{name}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.randn(_ROWS_PER_DRAW, num_columns, generator=generator)
        top, bottom = max(start, rows.start), min(start + _ROWS_PER_DRAW, rows.stop)
        out[top - rows.start : bottom - rows.start] = drawn[top - start : bottom - start, columns]
    return out.mul_(std)
