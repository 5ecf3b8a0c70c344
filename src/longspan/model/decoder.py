"""A decoder language model from parts: made on the meta device, filled shard by shard, run whole or split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from longspan.layout.weights import Box
from longspan.mixers.config import RotaryConfig
from longspan.mixers.contract import Context
from longspan.mixers.rotary import Rotary
from longspan.mixers.softmax import Attention
from longspan.model.config import DecoderConfig
from longspan.model.local import LocalContext
from longspan.model.loss import Words, chunked_cross_entropy
from longspan.model.part import ALL, Layers, ModelPart
from longspan.model.parts import Block, Mlp, make_norm
from longspan.model.shards import Region, drawn, fill


class DecoderLM(nn.Module):
    """Embedding, `blocks`, last norm and head.

    Every entry takes a `Context`; None stands for one process that holds whole rows, causal. Under FSDP2 only `forward`
    runs the hooks that
    gather weights: a caller of `hidden` or `loss` registers them with
    `torch.distributed.fsdp.register_fsdp_forward_method`.
    """

    def __init__(self, config: DecoderConfig, part: ModelPart = ALL) -> None:
        super().__init__()
        self.config, self.part = config, part
        positions, width = config.positions, config.hidden_size
        words = part.split.share(config.vocab_size)
        learned = not isinstance(positions, RotaryConfig)
        rotary = None if learned else Rotary(positions, config.attention.head_dim)
        layers = range(config.num_layers) if part.layers is None else part.layers
        tied_here = part.last and config.tie_embeddings
        self.embed = nn.Embedding(len(words), width) if part.first or tied_here else None
        self.embed_positions = nn.Embedding(positions.max_positions, width) if learned and part.first else None
        self.blocks = Layers((layer, Block(config, layer, rotary, part.split)) for layer in layers)
        self.norm = make_norm(config.norm, width) if part.last else None
        self.head = nn.Linear(width, len(words), bias=False) if part.last and not config.tie_embeddings else None

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

    def _mlps(self) -> list[Mlp]:
        return [module for module in self.modules() if isinstance(module, Mlp)]

    def forward(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l vocab"]:
        """Logits of every local token."""
        if self.part.split.size > 1:
            raise ValueError(
                f"logits need the whole vocabulary on one process, got it split over {self.part.split.size} tensor "
                "ranks: call loss, or load the exported model"
            )
        return F.linear(self.hidden(input_ids, ctx), self.head_weight)

    def hidden(self, input_ids: Int64[Tensor, "b l"], ctx: Context | None = None) -> Float[Tensor, "b l c"]:
        """States after the last norm, of a model that is whole on this process or split by tensor parallelism.

        Raises:
            ValueError: ids of a wrong shape, dtype or range (the range on a CPU only; a GPU asserts in its gather), or
                positions beyond the learned ones.
        """
        self._check_ids(input_ids)
        if ctx is None:
            ctx = LocalContext(input_ids.shape[1], input_ids.device)
        return self._normed(self._run(self._embedded(input_ids, ctx), ctx, range(self.config.num_layers)), ctx)

    def loss(
        self,
        input_ids: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"],
        ctx: Context | None = None,
        *,
        chunk_tokens: int = 1024,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Summed cross-entropy (nats, fp32) over local labels but -100, and their number; full logits never exist.

        Under tensor parallelism every rank of a group has the same sum, and its own part of the gradient.
        """
        return self._loss(self.hidden(input_ids, ctx), labels, chunk_tokens)

    def stage(
        self,
        x: Int64[Tensor, "b l"] | Float[Tensor, "b m c"],
        ctx: Context,
        layers: range,
        labels: Int64[Tensor, "b l"],
    ) -> Tensor:
        """Part of ``loss``, for a pipeline: ids (before layer 0) or states through ``layers``, to states or, after the
        last layer, to the summed cross-entropy."""
        if layers.start == 0:
            self._check_ids(x)
            x = self._embedded(x, ctx)
        x = self._run(x, ctx, layers)
        if layers.stop < self.config.num_layers:
            return x
        return self._loss(self._normed(x, ctx), labels, 1024)[0]

    def boxes(self) -> dict[str, Box]:
        """Where the parameters that tensor parallelism splits stand in the whole ones; the others all ranks hold."""
        boxes: dict[str, Box] = {}
        if self.part.split.size == 1:
            return boxes
        words = self.part.split.share(self.config.vocab_size)
        for name in ("embed", "head"):
            if getattr(self, name) is not None:
                boxes[f"{name}.weight"] = Box((self.config.vocab_size, self.config.hidden_size), (words.start, 0))
        for path, module in self.named_modules():
            if isinstance(module, Attention | Mlp):
                boxes |= {f"{path}.{name}": box for name, box in module.boxes().items()}
        return boxes

    def _embedded(self, input_ids: Tensor, ctx: Context) -> Tensor:
        if ctx.positions.shape != input_ids.shape[1:]:
            raise ValueError(
                f"a context must have a position for each local token, got {tuple(ctx.positions.shape)} positions for "
                f"{input_ids.shape[1]} tokens: pass the rank's own shard of the sequence"
            )
        assert self.embed is not None
        split = self.part.split
        if split.size == 1:
            x = self.embed(input_ids)
        else:
            words = split.share(self.config.vocab_size)
            elsewhere = (input_ids < words.start) | (input_ids >= words.stop)
            x = self.embed((input_ids - words.start).masked_fill(elsewhere, 0))
            x = split.scatter(x.masked_fill(elsewhere[..., None], 0))
        if self.embed_positions is not None:
            self._check_positions(ctx.positions)
            x = x + self.embed_positions(split.own(ctx.positions))
        return x

    def _run(self, x: Tensor, ctx: Context, layers: range) -> Tensor:
        for block in self.blocks.of(layers):
            x = block(x, ctx)
        return x

    def _normed(self, x: Tensor, ctx: Context) -> Tensor:
        assert self.norm is not None
        return self.part.split.gather(self.norm(x), ctx.positions.shape[0])

    def _loss(self, hidden: Tensor, labels: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
        split, total = self.part.split, self.config.vocab_size
        words = None if split.size == 1 else Words(split.share(total).start, total, split.group)
        return chunked_cross_entropy(hidden, self.head_weight, labels, chunk_tokens=chunk_tokens, words=words)

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


def _readable(x: Tensor) -> bool:
    # A GPU would have to wait for its values, and a traced or fake tensor has none.
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


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


def init_weights(model: DecoderLM, seed: int) -> None:
    """Fills all parameters, sharded or not: weights N(0, init_std²), smaller back into the residual stream, norms 1,
    biases 0.

    The values depend on (seed, parameter name) alone, not on sharding, ranks, device or the order of parameters: every
    64 rows of a weight have a CPU generator of their own, seeded by a hash of (seed, name, first row), drawn in fp32. A
    rank draws only the row groups that its shard touches (of a weight split along columns, all row groups, one at a
    time).

    Raises:
        ValueError: parameters on the meta device.
    """
    std, boxes = model.config.init_std, model.boxes()
    for name, parameter in model.named_parameters():
        box = boxes.get(name)
        if name.endswith("bias"):
            fill(parameter, lambda region: torch.zeros(_shape(region)), box)
        elif parameter.ndim == 1:
            fill(parameter, lambda region: torch.ones(_shape(region)), box)
        else:
            residual = name.endswith(("mixer.out.weight", "mlp.down.weight"))
            scale = std / (2 * model.config.num_layers) ** 0.5 if residual else std
            columns = parameter.shape[1] if box is None else box.shape[1]
            fill(parameter, lambda region, n=name, s=scale, c=columns: _draw(seed, n, region, c, s), box)


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(r.stop - r.start for r in region)


def _draw(seed: int, name: str, region: Region, num_columns: int, std: float) -> Tensor:
    return drawn(seed, name, region, num_columns, lambda shape, g: torch.randn(shape, generator=g)).mul_(std)
