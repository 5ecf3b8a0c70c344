"""Encoders from the decoder's parts: BERT (Devlin et al. 2018, arXiv:1810.04805) and ViT (Dosovitskiy et al. 2020,
arXiv:2010.11929) are values of `EncoderConfig`.

Attention is full, and whose business that is, is the context's: None stands for whole rows on one process; rows with
padding take `LocalContext(..., causal=False, lengths=...)`; a sequence split over ranks takes a context over
`masks.full`, or `masks.documents(lengths, causal=False)` where rows of unequal lengths are packed into one.

Cost: as of a decoder's blocks, over all s² pairs of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from longspan.layout.weights import Box
from longspan.mixers.contract import Context
from longspan.model.config import MlpKind
from longspan.model.decoder import init_weights
from longspan.model.encoder_config import EncoderConfig, PatchesConfig, TokensConfig
from longspan.model.local import LocalContext
from longspan.model.loss import IGNORED, chunked_cross_entropy, default_chunk, readable
from longspan.model.part import Layers
from longspan.model.parts import Block, activation, make_norm


class TokenInputs(nn.Module):
    """Embeddings of the local tokens: of ids, positions and types, added."""

    def __init__(self, config: TokensConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, hidden_size)
        self.positions = nn.Embedding(config.max_positions, hidden_size)
        self.types = nn.Embedding(config.num_types, hidden_size) if config.num_types else None

    def num_tokens(self, inputs: Tensor) -> int:
        """Tokens of a whole row of `inputs`."""
        return inputs.shape[-1]

    def forward(self, input_ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """States (b, l, c) before the first block; without `types` all tokens are of type 0."""
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be integers of shape (b, l), got {input_ids.dtype} of {tuple(input_ids.shape)}: "
                "add a batch dim"
            )
        if positions.shape != input_ids.shape[1:]:
            raise ValueError(
                f"a context must have a position for each local token, got {tuple(positions.shape)} positions for "
                f"{input_ids.shape[1]} tokens: pass the rank's own shard of the sequence"
            )
        if types is not None and (self.types is None or types.shape != input_ids.shape):
            raise ValueError(
                f"token types must be one for each of {tuple(input_ids.shape)} tokens of a model with types, got "
                f"{tuple(types.shape)} for {self.config.num_types} types: leave them out"
            )
        for what, values, limit in (
            ("input_ids", input_ids, self.config.vocab_size),
            ("learned positions", positions, self.config.max_positions),
            ("token types", types, self.config.num_types),
        ):
            if values is not None:
                _check_range(what, values, limit)
        x = self.embed(input_ids) + self.positions(positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        return x


class PatchInputs(nn.Module):
    """The local tokens of images: position 0 is cls, position i the patch i - 1, row by row.

    A rank of a split sequence is given whole images and embeds the patches at its own positions alone.
    """

    def __init__(self, config: PatchesConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(config.patch_values, hidden_size)
        self.cls = nn.Parameter(torch.empty(1, hidden_size))
        self.positions = nn.Embedding(config.num_tokens, hidden_size)

    def num_tokens(self, inputs: Tensor) -> int:
        """Tokens of a whole image."""
        del inputs
        return self.config.num_tokens

    def forward(self, images: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """States (b, l, c) before the first block of the images' tokens at `positions`."""
        if types is not None:
            raise ValueError(f"images have no token types, got some of shape {tuple(types.shape)}: leave them out")
        wanted = (self.config.num_channels, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            raise ValueError(
                f"images must be floats of shape (b, {', '.join(map(str, wanted))}), got {images.dtype} of "
                f"{tuple(images.shape)}: resize them"
            )
        _check_range("positions of an image", positions, self.config.num_tokens)
        first = positions == 0
        patches = _patches(images, self.config.patch_size)[:, (positions - 1).clamp(min=0)]
        x = torch.where(first[:, None], self.cls, self.patch(patches))
        return x + self.positions(positions)


def _patches(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, channels, height, width) to (b, patches, values), each patch's values ordered channel, row, column."""
    cut = images.unflatten(2, (-1, size[0])).unflatten(4, (-1, size[1]))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class MaskedLMHead(nn.Module):
    """A linear, the mlp's activation and a norm before the embedding is used as the output matrix, with a bias."""

    def __init__(self, config: EncoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.kind: MlpKind = config.mlp.kind
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config.norm, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """States (b, l, c) that the output matrix takes."""
        return self.norm(activation(self.kind, self.dense(hidden)))


class Encoder(nn.Module):
    """Inputs, `blocks`, a norm before or after them, and a head. Every entry takes a `Context`, see the module."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, inputs = config.hidden_size, config.inputs
        tokens = isinstance(inputs, TokensConfig)
        self.inputs = TokenInputs(inputs, width) if tokens else PatchInputs(inputs, width)
        self.embed_norm = make_norm(config.norm, width) if config.embed_norm else None
        self.blocks = Layers((layer, Block(config, layer, None)) for layer in range(config.num_layers))
        self.norm = None if config.wiring == "post" else make_norm(config.norm, width)
        self.head: nn.Module | None = None
        if config.head == "masked_lm":
            assert tokens
            self.head = MaskedLMHead(config, inputs.vocab_size)
        elif config.head == "classifier":
            self.head = nn.Linear(width, config.num_classes)
        elif config.head == "pooler":
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(
        self,
        inputs: Tensor,
        ctx: Context | None = None,
        *,
        types: Int64[Tensor, "b l"] | None = None,
    ) -> Tensor:
        """What the head gives: (b, l, vocab) of a masked-LM head, (b, l, c) without a head, else (b, classes or c).

        A classifier or pooler answers for the rows whose first token is here: of a split sequence, one rank has b rows
        and the others none; of packed documents, there is one row for each that starts here.

        Args:
            inputs: local token ids (b, l), or whole images (b, channels, height, width).
            types: local token types (b, l); None: all 0.

        Raises:
            ValueError: inputs that are not the config's, or of which the context has other positions.
        """
        ctx = self._context(inputs) if ctx is None else ctx
        hidden = self.hidden(inputs, ctx, types=types)
        if self.head is None:
            return hidden
        if isinstance(self.head, MaskedLMHead):
            return F.linear(self.head(hidden), self._embedding(), self.head.bias)
        return self.head(_first(hidden, ctx))

    def hidden(
        self, inputs: Tensor, ctx: Context | None = None, *, types: Int64[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b l c"]:
        """States of the local tokens after the last block and norm. Raises as `forward`."""
        ctx = self._context(inputs) if ctx is None else ctx
        x = self.inputs(inputs, ctx.positions, types)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        for block in self.blocks:
            x, _ = block(x, ctx)
        return x if self.norm is None else self.norm(x)

    def loss(
        self,
        inputs: Tensor,
        labels: Int64[Tensor, " *rows"],
        ctx: Context | None = None,
        *,
        types: Int64[Tensor, "b l"] | None = None,
        chunk_tokens: int | None = None,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Summed cross-entropy (nats) over labels but -100, and their number, of a masked-LM or a classifier.

        `labels` are (b, l), the tokens that stood where the input is masked and -100 elsewhere; or (rows,), a class for
        each row that `forward` answers for here. `chunk_tokens`: rows of a masked-LM's logits that exist at one time;
        None: `default_chunk`.

        Raises:
            ValueError: as `forward`, labels of another shape, or a head that has no such loss.
        """
        ctx = self._context(inputs) if ctx is None else ctx
        hidden = self.hidden(inputs, ctx, types=types)
        if isinstance(self.head, MaskedLMHead):
            states, bias = self.head(hidden), self.head.bias
            chunk_tokens = default_chunk(self.config.hidden_size) if chunk_tokens is None else chunk_tokens
            return chunked_cross_entropy(states, self._embedding(), labels, chunk_tokens=chunk_tokens, bias=bias)
        if self.head is None or self.config.head != "classifier":
            raise ValueError(
                f"a loss needs a masked_lm or classifier head, got {self.config.head}: give the config one"
            )
        logits = self.head(_first(hidden, ctx))
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must be one class for each of {logits.shape[0]} rows, got {tuple(labels.shape)}: "
                "give those of the rows that start here"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # `hidden` with a factor of 0: ranks without a first token share in the backward too.
        total = F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED) + 0 * hidden.sum()
        return total, (labels != IGNORED).sum()

    def boxes(self) -> dict[str, Box]:
        """As of a decoder: none, for an encoder is whole on every rank, or sharded by FSDP alone."""
        return {}

    def _context(self, inputs: Tensor) -> Context:
        return LocalContext(self.inputs.num_tokens(inputs), inputs.device, causal=False)

    def _embedding(self) -> Tensor:
        assert isinstance(self.inputs, TokenInputs)
        return self.inputs.embed.weight


def _first(hidden: Tensor, ctx: Context) -> Tensor:
    """States (rows, c) of the first tokens that are here, batch by batch."""
    return hidden[:, (ctx.positions == 0).nonzero()[:, 0]].flatten(0, 1)


def _check_range(what: str, values: Tensor, limit: int) -> None:
    if readable(values) and values.numel():
        low, high = (int(x) for x in values.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{what} must lie in 0..{limit - 1}, got {low if low < 0 else high}: cut or map them")


def build_encoder(
    config: EncoderConfig,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Encoder:
    """An encoder of `config`: on "meta" shapes only, on any other device initialised by `seed`, as `decoder.build`."""
    with torch.device("meta"):
        model = Encoder(config).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    init_weights(model, seed)
    return model
