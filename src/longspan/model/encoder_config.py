"""The typed config of an encoder over the same parts as a decoder's; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from longspan.mixers.config import AttentionConfig, require
from longspan.model.config import MlpConfig, NormConfig, Wiring, check_wiring

Head = Literal["masked_lm", "classifier", "pooler"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensConfig:
    """Token ids: embedding plus a learned vector for each position, and for each token's type where there are types."""

    vocab_size: int
    max_positions: int = 512
    num_types: int = 0

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("max_positions", 1), ("num_types", 0)):
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}", value, "count them again")


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchesConfig:
    """Images cut into patches, each a token by one matrix, behind a first token of their own (cls); learned positions.

    `image_size` and `patch_size` are (height, width) in pixels.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3

    def __post_init__(self) -> None:
        require(self.num_channels > 0, "num_channels must be positive", self.num_channels, "1 grey, 3 colours")
        require(
            all(patch > 0 and image > 0 and image % patch == 0 for image, patch in self._sides()),
            "image_size must be a multiple of patch_size",
            (self.image_size, self.patch_size),
            "crop the images",
        )

    def _sides(self) -> list[tuple[int, int]]:
        return list(zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        (height, h), (width, w) = self._sides()
        return (height // h) * (width // w)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: cls and the patches."""
        return 1 + self.num_patches

    @property
    def patch_values(self) -> int:
        """Values of one patch, over all channels."""
        return self.num_channels * self.patch_size[0] * self.patch_size[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """An encoder: inputs, `num_layers` blocks of (full attention, mlp), a last norm unless blocks end with one, a head.

    Args:
        inputs: token ids or images.
        wiring: as of a decoder; post-norm blocks need no last norm.
        embed_norm: a norm between inputs and blocks.
        head: masked_lm: logits of every token over the vocabulary, through the embedding; classifier: logits over
            `num_classes` from the first token; pooler: tanh of a linear of the first token (BERT's); None: the states.
        init_std: as of a decoder.
    """

    num_layers: int
    hidden_size: int
    inputs: TokensConfig | PatchesConfig
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = field(default_factory=lambda: NormConfig(kind="layer", eps=1e-12))
    wiring: Wiring = "sequential"
    embed_norm: bool = False
    head: Head | None = None
    num_classes: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "init_std"):
            require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name), "give more")
        check_wiring(self.wiring)
        require(
            self.head is None or self.head in get_args(Head),
            "head must be masked_lm, classifier, pooler or None",
            self.head,
            "pick one of these",
        )
        require(
            self.head != "masked_lm" or isinstance(self.inputs, TokensConfig),
            "a masked_lm head needs tokens",
            type(self.inputs).__name__,
            "give images a classifier",
        )
        require(
            (self.num_classes > 0) == (self.head == "classifier"),
            "num_classes must be positive with a classifier and 0 without",
            (self.head, self.num_classes),
            "change one of them",
        )

    def window(self, layer: int) -> int | None:
        """None: every token sees every token, in every layer."""
        del layer
        return None

    def channel_mixer(self, layer: int) -> MlpConfig:
        """The mlp of every layer."""
        del layer
        return self.mlp
