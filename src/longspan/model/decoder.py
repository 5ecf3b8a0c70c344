"""A decoder language model from parts: made on the meta device, filled shard by shard, run whole or split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from longspan.layout.weights import Box
from longspan.mixers.config import RotaryConfig
from longspan.mixers.contract import Context
from longspan.mixers.norm import PlusOneRMSNorm
from longspan.mixers.rotary import Rotary
from longspan.mixers.softmax import Attention
from longspan.model.config import DecoderConfig
from longspan.model.local import LocalContext
from longspan.model.loss import Words, chunked_cross_entropy, default_chunk, readable
from longspan.model.moe import Experts, Moe, Routing, balance_loss, reset_balance
from longspan.model.part import ALL, Layers, ModelPart
from longspan.model.parts import Block, Mlp, make_norm
from longspan.model.shards import Region, drawn, fill

if TYPE_CHECKING:
    from longspan.model.encoder import Encoder


class Losses(NamedTuple):
    """What a model is trained on, summed over local tokens, fp32 at least.

    Attributes:
        cross_entropy: nats, over labels but -100.
        num_labels: how many.
        aux: the auxiliary loss of the experts' balance (`longspan.model.moe`); None where the model has none.
    """

    cross_entropy: Float[Tensor, ""]
    num_labels: Int[Tensor, ""]
    aux: Float[Tensor, ""] | None


class DecoderLM(nn.Module):
    """Embedding, `blocks`, last norm and head.

    Every entry takes a `Context`; None stands for one process that holds whole rows, causal. Under FSDP2 only `forward`
    runs the hooks that gather weights: a caller of `hidden`, `loss` or `losses` registers them with
    `torch.distributed.fsdp.register_fsdp_forward_method`.
    """

    expert_load: Tensor | None

    def __init__(self, config: DecoderConfig, part: ModelPart = ALL) -> None:
        super().__init__()
        self.config, self.part = config, part
        positions, width = config.positions, config.hidden_size
        words = part.split.share(config.vocab_size)
        learned = not isinstance(positions, RotaryConfig)
        rotary = windowed = None if learned else Rotary(positions, config.attention.head_dim)
        if config.windowed_positions is not None:
            windowed = Rotary(config.windowed_positions, config.attention.head_dim)
        layers = tuple(range(config.num_layers)) if part.layers is None else part.layers
        self._sparse = tuple(layer for layer in layers if layer in config.sparse_layers)
        tied_here = part.last and config.tie_embeddings
        self.embed = nn.Embedding(len(words), width) if part.first or tied_here else None
        self.embed_positions = nn.Embedding(positions.max_positions, width) if learned and part.first else None
        self.blocks = Layers(
            (layer, Block(config, layer, rotary if config.window(layer) is None else windowed, part))
            for layer in layers
        )
        self.norm = make_norm(config.norm, width) if part.last else None
        self.head = nn.Linear(width, len(words), bias=False) if part.last and not config.tie_embeddings else None
        load = None
        if config.moe is not None and config.moe.balance == "bias":
            load = torch.zeros(len(self._sparse), config.moe.num_experts, dtype=torch.int64)
        # Local tokens of each expert of each sparse layer since the last `balance`.
        self.register_buffer("expert_load", load, persistent=False)

    @property
    def head_weight(self) -> Float[Tensor, "vocab c"]:
        """The matrix of the head, which is the embedding's where they are tied."""
        holder = self.embed if self.config.tie_embeddings else self.head
        assert holder is not None
        return holder.weight

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

    def _mlps(self) -> list[Mlp | Moe]:
        return [module for module in self.modules() if isinstance(module, Mlp | Moe)]

    def _moes(self) -> list[Moe]:
        return [module for module in self.modules() if isinstance(module, Moe)]

    def forward(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l vocab"]:
        """Logits of every local token."""
        if self.part.split.size > 1:
            raise ValueError(
                f"logits need the whole vocabulary on one process, got it split over {self.part.split.size} tensor "
                "ranks: call loss, or load the exported model"
            )
        return self.logits(self.hidden(input_ids, ctx))

    def logits(self, hidden: Float[Tensor, "... c"]) -> Float[Tensor, "... vocab"]:
        """The head on states that `hidden` gave, capped where the config says so."""
        logits, softcap = F.linear(hidden, self.head_weight), self.config.final_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def hidden(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l c"]:
        """States after the last norm, of a model that is whole on this process or split by tensor parallelism.

        Raises:
            ValueError: ids of a wrong shape, dtype or range (the range on a CPU only; a GPU asserts in its gather), or
                positions beyond the learned ones.
        """
        return self._whole(input_ids, self._context(input_ids, ctx))[0]

    def losses(
        self,
        input_ids: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"],
        ctx: Context | None = None,
        *,
        chunk_tokens: int | None = None,
    ) -> Losses:
        """Cross-entropy and auxiliary loss apart; full logits never exist, but for `chunk_tokens` rows at a time (None:
        `default_chunk`). Collective where experts are balanced.

        With balance "bias" and gradients on, the experts' load is noted for `balance`. Under tensor parallelism every
        rank of a group has the same cross-entropy, and its own part of the gradient.
        """
        ctx = self._context(input_ids, ctx)
        hidden, routings = self._whole(input_ids, ctx)
        return Losses(*self._cross_entropy(hidden, labels, chunk_tokens), self._aux(routings, ctx))

    def loss(
        self,
        input_ids: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"],
        ctx: Context | None = None,
        *,
        chunk_tokens: int | None = None,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """What is minimised, and the number of labels: of `losses`, the cross-entropy plus the auxiliary loss."""
        # Not self.losses, which may have FSDP's hooks of its own.
        total, num_labels, aux = DecoderLM.losses(self, input_ids, labels, ctx, chunk_tokens=chunk_tokens)
        return total if aux is None else total + aux, num_labels

    def stage(
        self,
        x: Int64[Tensor, "b l"] | Float[Tensor, "b m c"],
        ctx: Context,
        layers: range,
        labels: Int64[Tensor, "b l"],
    ) -> tuple[Tensor, Tensor | None]:
        """Part of ``losses``, for a pipeline: ids (before layer 0) or states through ``layers``, to states or, after
        the last layer, to the summed cross-entropy; and the auxiliary loss of these layers."""
        if layers.start == 0:
            x = self._embedded(x, self._context(x, ctx))
        x, routings = self._run(x, ctx, layers)
        aux = self._aux(routings, ctx)
        if layers.stop < self.config.num_layers:
            return x, aux
        return self._cross_entropy(self._normed(x, ctx), labels)[0], aux

    def balance(self, ctx: Context | None = None) -> None:
        """Moves the bias of every sparse layer against the load since the last call; does nothing without biases.

        To be called once after each optimiser step. Collective over the ranks of `ctx.total`.
        """
        if self.expert_load is None:
            return
        load = self.expert_load if ctx is None else ctx.total(self.expert_load)
        for moe, counts in zip(self._moes(), load, strict=True):
            moe.move_bias(counts)
        self.expert_load.zero_()

    def boxes(self) -> dict[str, Box]:
        """Where the parameters that tensor and expert ranks split stand in the whole ones; the others are whole."""
        boxes: dict[str, Box] = {}
        split_kinds: tuple[type, ...] = (Experts,) if self.part.experts.size > 1 else ()
        if self.part.split.size > 1:
            split_kinds = (Attention, Mlp, Experts)
            words = self.part.split.share(self.config.vocab_size)
            for name in ("embed", "head"):
                if getattr(self, name) is not None:
                    boxes[f"{name}.weight"] = Box((self.config.vocab_size, self.config.hidden_size), (words.start, 0))
        for path, module in self.named_modules():
            if isinstance(module, split_kinds):
                boxes |= {f"{path}.{name}": box for name, box in module.boxes().items()}
        return boxes

    def _context(self, input_ids: Tensor, ctx: Context | None) -> Context:
        self._check_ids(input_ids)
        if ctx is None:
            ctx = LocalContext(input_ids.shape[1], input_ids.device)
        if ctx.positions.shape != input_ids.shape[1:]:
            raise ValueError(
                f"a context must have a position for each local token, got {tuple(ctx.positions.shape)} positions for "
                f"{input_ids.shape[1]} tokens: pass the rank's own shard of the sequence"
            )
        return ctx

    def _embedded(self, input_ids: Tensor, ctx: Context) -> Tensor:
        assert self.embed is not None
        split = self.part.split
        if split.size == 1:
            x = self.embed(input_ids)
        else:
            words = split.share(self.config.vocab_size)
            elsewhere = (input_ids < words.start) | (input_ids >= words.stop)
            x = self.embed((input_ids - words.start).masked_fill(elsewhere, 0))
            x = split.scatter(x.masked_fill(elsewhere[..., None], 0))
        if self.config.embed_scale is not None:
            x = x * _rounded(self.config.embed_scale, x.dtype)
        if self.embed_positions is not None:
            self._check_positions(ctx.positions)
            x = x + self.embed_positions(split.own(ctx.positions))
        return x

    def _run(self, x: Tensor, ctx: Context, layers: range) -> tuple[Tensor, dict[int, Routing]]:
        """States after some layers, and the routing of each sparse one."""
        routings: dict[int, Routing] = {}
        for layer, block in zip(layers, self.blocks.of(layers), strict=True):
            x, routing = block(x, ctx)
            if routing is not None:
                routings[layer] = routing
        return x, routings

    def _whole(self, input_ids: Tensor, ctx: Context) -> tuple[Tensor, dict[int, Routing]]:
        x, routings = self._run(self._embedded(input_ids, ctx), ctx, range(self.config.num_layers))
        return self._normed(x, ctx), routings

    def _aux(self, routings: dict[int, Routing], ctx: Context) -> Tensor | None:
        """The auxiliary loss of some layers; tensor ranks, which route the same tokens, have an equal part each."""
        moe = self.config.moe
        if moe is None or moe.balance == "none" or not routings:
            return None
        # What the blocks returned, not what they did: a recomputed block would count its tokens twice.
        counts = torch.stack([routing.counts for routing in routings.values()])
        if moe.balance == "bias":
            if torch.is_grad_enabled() and self.expert_load is not None:
                for layer, count in zip(routings, counts, strict=True):
                    self.expert_load[self._sparse.index(layer)] += count
            return None
        scores = [routing.scores for routing in routings.values() if routing.scores is not None]
        return balance_loss(moe, ctx.total(counts), torch.stack(scores)) / self.part.split.size

    def _normed(self, x: Tensor, ctx: Context) -> Tensor:
        assert self.norm is not None
        return self.part.split.gather(self.norm(x), ctx.positions.shape[0])

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        chunk_tokens = default_chunk(self.config.hidden_size) if chunk_tokens is None else chunk_tokens
        split, total = self.part.split, self.config.vocab_size
        words = None if split.size == 1 else Words(split.share(total).start, total, split.group)
        return chunked_cross_entropy(
            hidden,
            self.head_weight,
            labels,
            chunk_tokens=chunk_tokens,
            softcap=self.config.final_softcap,
            words=words,
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be integers of shape (b, l), got {input_ids.dtype} of {tuple(input_ids.shape)}: "
                "add a batch dim"
            )
        if readable(input_ids) and input_ids.numel():
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must lie in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high}: "
                    "is the tokenizer's vocabulary larger than the model's?"
                )

    def _check_positions(self, positions: Tensor) -> None:
        limit = self.config.positions.max_positions
        if readable(positions) and positions.numel() and int(positions.max()) >= limit:
            raise ValueError(
                f"learned positions end at {limit - 1}, got {int(positions.max())}: cut the sequence to {limit} tokens"
            )


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` holds it: in bf16 the factor √3072 is 55.5. In plain numbers, which cost no operation."""
    fraction, exponent = math.frexp(value)
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(fraction, digits)), exponent - digits)


def build(
    config: DecoderConfig,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    part: ModelPart = ALL,
) -> DecoderLM:
    """A model of `config`, or this process's part of one. On "meta" it has shapes only: shard it,
    `model.to_empty(device=...)`, then `init_weights` or `load_into`.

    On any other device it comes initialised with `seed`.
    """
    with torch.device("meta"):
        model = DecoderLM(config, part).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def init_weights(model: DecoderLM | Encoder, seed: int) -> None:
    """Fills all parameters, sharded or not: weights N(0, init_std²), smaller back into the residual stream, biases
    0, norms such that their factor is 1.

    The values depend on (seed, parameter name) alone, not on sharding, ranks, device or the order of parameters: every
    64 rows of a weight (of each matrix of a stack) have a CPU generator of their own, seeded by a hash of (seed, name,
    first row), drawn in fp32. A rank draws only the row groups that its shard touches (of a weight split along columns,
    all row groups, one at a time).

    Raises:
        ValueError: parameters on the meta device.
    """
    std, boxes = model.config.init_std, model.boxes()
    plus_one = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, PlusOneRMSNorm)}
    reset_balance(model)
    for name, parameter in model.named_parameters():
        box = boxes.get(name)
        if name.endswith("bias") or name in plus_one:
            fill(parameter, lambda region: torch.zeros(_shape(region)), box)
        elif parameter.ndim == 1:
            fill(parameter, lambda region: torch.ones(_shape(region)), box)
        else:
            residual = name.endswith(("mixer.out.weight", ".down.weight", "experts.down"))
            scale = std / (2 * model.config.num_layers) ** 0.5 if residual else std
            columns = parameter.shape[-1] if box is None else box.shape[-1]
            fill(parameter, lambda region, n=name, s=scale, c=columns: _draw(seed, n, region, c, s), box)


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(r.stop - r.start for r in region)


def _draw(seed: int, name: str, region: Region, num_columns: int, std: float) -> Tensor:
    if len(region) == 3:  # stacked matrices, each with a name of its own
        stacked = range(region[0].start, region[0].stop)
        return torch.stack([_draw(seed, f"{name}.{i}", region[1:], num_columns, std) for i in stacked])
    return drawn(seed, name, region, num_columns, lambda shape, g: torch.randn(shape, generator=g)).mul_(std)
