"""The typed config of a decoder language model over parts, and its JSON form.

A published architecture is a value of `DecoderConfig`, never a class. JSON keeps every field under its own name; an
unknown or missing key is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from longspan.mixers.config import AttentionConfig, LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling, require

MlpKind = Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
Wiring = Literal["sequential", "parallel", "sandwich", "post"]
Score = Literal["softmax", "sigmoid"]
Balance = Literal["none", "aux", "aux_pooled", "bias"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedPositionsConfig:
    """A learned vector for each position below `max_positions` (GPT-2), added to the embedding."""

    kind: Literal["learned"] = "learned"
    max_positions: int = 1024

    def __post_init__(self) -> None:
        require(self.kind == "learned", "kind of LearnedPositionsConfig is 'learned'", self.kind, "leave it out")
        require(
            self.max_positions > 0, "max_positions must be positive", self.max_positions, "give the longest sequence"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    """The channel mixer. swiglu: down(silu(gate x) * up x); geglu_tanh: the same with gelu by tanh for silu; gelu:
    down(gelu(up x)), exact, by erf; gelu_tanh: with GPT-2's approximation of it.
    """

    kind: MlpKind = "swiglu"
    inner_size: int
    bias: bool = False

    @property
    def gated(self) -> bool:
        """Whether a third matrix gates the inner activations."""
        return self.kind in ("swiglu", "geglu_tanh")

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(MlpKind),
            "mlp kind must be swiglu, geglu_tanh, gelu or gelu_tanh",
            self.kind,
            "pick one of these",
        )
        require(self.inner_size > 0, "mlp inner_size must be positive", self.inner_size, "give at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture of experts in the place of an mlp: each a swiglu without biases; see `longspan.model.moe`.

    Args:
        num_experts: E, of which each token goes to `experts_per_token` (k).
        inner_size: inner width of one expert.
        score: what the router makes of its logits before the k largest are chosen.
        renormalise: divide the k chosen scores by their sum.
        shared_inner_size: inner width of a swiglu that all tokens go through besides; 0: none.
        shared_gate: its output is multiplied by the sigmoid of a learned projection of the token.
        balance: how experts are kept evenly loaded in training. "aux": an auxiliary loss in each layer (Switch);
            "aux_pooled": one over all layers together, as transformers has it; "bias": without a loss (DeepSeek-V3).
        aux_coef: weight of the auxiliary loss.
        bias_speed: step of the bias at each optimiser step.
        capacity_factor: an expert takes at most ceil(factor · k · l / E) of the l local tokens of a row, the first
            ones, and adds nothing to the others; None: all (dropless).
    """

    num_experts: int
    experts_per_token: int
    inner_size: int
    score: Score = "softmax"
    renormalise: bool = True
    shared_inner_size: int = 0
    shared_gate: bool = False
    balance: Balance = "none"
    aux_coef: float = 0.01
    bias_speed: float = 0.001
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        require(self.num_experts > 1, "num_experts must be at least 2", self.num_experts, "one expert is an mlp")
        require(
            0 < self.experts_per_token <= self.num_experts,
            f"experts_per_token must lie in 1..{self.num_experts}",
            self.experts_per_token,
            "8 of 128 or 2 of 8 are usual",
        )
        require(self.inner_size > 0, "inner_size of an expert must be positive", self.inner_size, "give at least 1")
        require(self.score in get_args(Score), "score must be softmax or sigmoid", self.score, "pick one of these")
        require(self.shared_inner_size >= 0, "shared_inner_size must be 0 or more", self.shared_inner_size, "0: none")
        require(
            not self.shared_gate or self.shared_inner_size > 0,
            "a shared_gate needs a shared expert",
            self.shared_inner_size,
            "give its shared_inner_size, or leave shared_gate out",
        )
        require(
            self.balance in get_args(Balance),
            f"balance must be one of {', '.join(get_args(Balance))}",
            self.balance,
            "pick one of these",
        )
        require(self.aux_coef >= 0, "aux_coef must be 0 or more", self.aux_coef, "0.01 is usual")
        require(self.bias_speed > 0, "bias_speed must be positive", self.bias_speed, "0.001 is usual")
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            "capacity_factor must be positive",
            self.capacity_factor,
            "1.25 is usual, None: dropless",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """rms: RMSNorm with a weight; rms_plus_one: with 1 + weight (Gemma); layer: LayerNorm with weight and bias.
    Statistics in fp32 at least.
    """

    kind: NormKind = "rms"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(NormKind),
            "norm kind must be rms, rms_plus_one or layer",
            self.kind,
            "pick one of these",
        )
        require(self.eps > 0, "norm eps must be positive", self.eps, "1e-6 is usual")


class LayersConfig(Protocol):
    """What a block reads of the config of its model, whichever model that is."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def attention(self) -> AttentionConfig: ...
    @property
    def norm(self) -> NormConfig: ...
    @property
    def wiring(self) -> Wiring: ...
    @property
    def init_std(self) -> float: ...

    def window(self, layer: int) -> int | None:
        """The window of one layer, None without."""
        ...

    def channel_mixer(self, layer: int) -> MlpConfig | MoeConfig:
        """The mlp or the mixture of experts of one layer."""
        ...


def check_wiring(wiring: str) -> None:
    """Raises the one-line ValueError unless `wiring` is a known one."""
    require(
        wiring in get_args(Wiring), "wiring must be sequential, parallel, sandwich or post", wiring, "pick one of these"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A decoder: embedding, `num_layers` blocks of (attention, mlp), a last norm and a head.

    Args:
        wiring: sequential: x += attn(norm(x)); x += mlp(norm(x)). parallel: x += attn(n) + mlp(n), n = norm(x) (one
            norm a block). sandwich: x += norm(attn(norm(x))); x += norm(mlp(norm(x))). post: x = norm(x + attn(x)); x =
            norm(x + mlp(x)).
        tie_embeddings: the head's weight is the embedding's.
        windows: for each layer the number of keys a query sees, itself included, or None for all; empty: no layer has a
            window.
        moe: experts in the place of `mlp` in every layer but `dense_layers`; None: every layer has an mlp.
        windowed_positions: rotary positions of the layers with a window; None: `positions`, as the others have.
        embed_scale: factor on the embedding, rounded to its dtype; None: 1.
        final_softcap: c in c·tanh(logits / c); None: no cap.
        init_std: standard deviation of freshly initialised weights; projections back into the residual stream get it /
            sqrt(2 layers).
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = field(default_factory=NormConfig)
    positions: RotaryConfig | LearnedPositionsConfig = field(default_factory=RotaryConfig)
    wiring: Wiring = "sequential"
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    init_std: float = 0.02
    moe: MoeConfig | None = None
    dense_layers: tuple[int, ...] = ()
    windowed_positions: RotaryConfig | None = None
    embed_scale: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name), "give at least 1")
        check_wiring(self.wiring)
        for name in ("embed_scale", "final_softcap"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive", value, "None: left out")
        require(self.init_std > 0, "init_std must be positive", self.init_std, "0.02 is usual")
        require(
            len(self.windows) in (0, self.num_layers),
            f"windows must be empty or have one entry for each of the {self.num_layers} layers",
            self.windows,
            "give None for a layer without a window",
        )
        require(
            all(w is None or w > 0 for w in self.windows),
            "a window must be positive or None",
            self.windows,
            "it counts the query itself",
        )
        require(
            self.moe is not None or not self.dense_layers,
            "dense_layers are those without the experts of moe, which is None",
            self.dense_layers,
            "give moe, or leave dense_layers out: every layer has an mlp",
        )
        require(
            self.dense_layers == tuple(sorted(set(self.dense_layers) & set(range(self.num_layers))))
            and len(self.dense_layers) < self.num_layers,
            f"dense_layers must be some of the layers 0..{self.num_layers - 1} in order, and not all",
            self.dense_layers,
            "moe None makes all dense",
        )
        require(
            self.windowed_positions is None or (any(self.windows) and isinstance(self.positions, RotaryConfig)),
            "windowed_positions need layers with a window, and rotary positions in the others",
            self.windowed_positions,
            "None: one rotation for all layers",
        )
        if isinstance(self.positions, RotaryConfig):
            require(
                self.attention.head_dim % 2 == 0,
                "rotary positions need an even head_dim",
                self.attention.head_dim,
                "change head_dim or use learned positions",
            )

    def window(self, layer: int) -> int | None:
        """The window of one layer, None without."""
        return self.windows[layer] if self.windows else None

    def channel_mixer(self, layer: int) -> MlpConfig | MoeConfig:
        """The mlp or the mixture of experts of one layer."""
        return self.mlp if self.moe is None or layer in self.dense_layers else self.moe

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers whose channel mixer is a mixture of experts."""
        return () if self.moe is None else tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        values = dataclasses.asdict(self)
        values["windows"], values["dense_layers"] = list(self.windows), list(self.dense_layers)
        return values

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal config back."""
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`. Raises ValueError on an unknown or missing key, naming it."""
        values = dict(values)
        for key, parts in _PARTS.items():
            if key in values and not (key in _OPTIONAL and values[key] is None):
                values[key] = _part(key, values[key], parts)
        windows = values.get("windows", [])
        whole = isinstance(windows, (list, tuple)) and all(w is None or type(w) is int for w in windows)
        require(whole, "windows must be a list of whole numbers or null", windows, "write it with to_json")
        values["windows"] = tuple(windows)
        dense = values.get("dense_layers", [])
        whole = isinstance(dense, (list, tuple)) and all(type(layer) is int for layer in dense)
        require(whole, "dense_layers must be a list of whole numbers", dense, "write it with to_json")
        values["dense_layers"] = tuple(dense)
        return _make(DecoderConfig, "decoder config", values)

    @staticmethod
    def from_json(text: str) -> DecoderConfig:
        """Inverse of `to_json`. Raises ValueError on text that is not JSON, and as `from_dict`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a decoder config must be JSON, got an error at {error.pos}: {error.msg}") from None
        require(
            isinstance(values, dict),
            "a decoder config must be a JSON object",
            type(values).__name__,
            "write it with to_json",
        )
        return DecoderConfig.from_dict(values)


_PARTS: dict[str, dict[str | None, type]] = {
    "attention": {None: AttentionConfig},
    "mlp": {None: MlpConfig},
    "moe": {None: MoeConfig},
    "norm": {None: NormConfig},
    "positions": {"rotary": RotaryConfig, "learned": LearnedPositionsConfig},
    "windowed_positions": {"rotary": RotaryConfig},
}
_OPTIONAL = ("moe", "windowed_positions")
_SCALINGS: dict[str | None, type] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def _part(name: str, value: Any, parts: dict[str | None, type]) -> Any:
    """One nested part; where several types stand, its `kind` chooses."""
    require(isinstance(value, dict), f"{name} must be a JSON object", value, "write it with to_json")
    kind = None if None in parts else value.get("kind")
    if kind not in parts:
        raise ValueError(f"kind of {name} must be one of {sorted(map(str, parts))}, got {kind!r}: pick one of these")
    value = dict(value)
    if value.get("scaling") is not None:
        value["scaling"] = _part("scaling", value["scaling"], _SCALINGS)
    return _make(parts[kind], name, value)


def _make(kind: type, where: str, values: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ValueError(f"{where} has no key {key!r}: {hint}")
    for name, entry in fields.items():
        if name not in values and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the key {name!r}: give it")
    hints = get_type_hints(kind)
    for name, value in values.items():
        allowed = hints[name]
        parts = () if get_origin(allowed) is tuple else get_args(allowed)
        scalars = {bool, int, float, str} & {allowed, *parts}
        if scalars and value is not None and type(value) not in scalars | ({int} if float in scalars else set()):
            words = " or ".join(sorted(kind.__name__ for kind in scalars))
            raise ValueError(f"{name} of {where} must be {words}, got {value!r}: write the file with to_json")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where} has a value of a wrong type, got {values!r}: {error}") from None
