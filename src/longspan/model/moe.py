"""Mixture of experts as a channel mixer (Shazeer et al. 2017, arXiv:1701.06538), dropless unless a capacity is given.

A router scores E experts for each token, the k best are chosen, and y = Σ_j w_j · expert_j(x) over the chosen j, each
expert a swiglu; an optional shared expert, of all tokens, is added. The work goes in steps that know nothing of each
other, so that tokens can be sent to other ranks between them:

    route    tokens -> experts and weights of each token
    arrange  experts -> the order that puts (token, choice) slots of one expert side by side, and each expert's count
    gather   tokens, order -> rows, sorted by expert
    compute_experts   rows, counts, the weights of *some* experts -> rows
    combine  rows, order, weights -> the weighted sum for each token

Scores are a softmax or sigmoids of the logits, in fp32 at least from the parameters as they are held (under bf16
computation, rounded to bf16 like all others). `renormalise` divides the chosen ones by their sum (Mixtral).

Balance. With f_e the share of the T tokens of the batch that e was chosen for (Σ_e f_e = k; before any capacity) and
p_e(t) the score of e at token t (sigmoids divided by their sum over experts), the loss is
coef · E · Σ_e f_e · mean_t p_e(t), for k = 1 the Switch Transformer's (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to
6): of each sparse layer ("aux", layers added up), or once with f and p averaged over these layers ("aux_pooled"). The
latter is exactly transformers' `load_balancing_loss_func`, and `aux_coef` then its `router_aux_loss_coef`. DeepSeek's f
is divided by k: its coefficient is k times ours. The gradient goes through p alone. `balance_loss` is the sum over
*local tokens*, T · the formula when added up over all ranks that share the batch, to go with a summed cross-entropy:
divided by the number of labels, the coefficient counts (tokens / labels) times. Only f, so only counts, is global.

"bias" has no loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1): a bias b_e joins the scores where experts are
chosen, never the weights, and moves by speed · sign(mean load - load of e) once an optimiser step.

Cost for n tokens of width c: 2·n·c·E + 6·n·k·c·inner + 2·n·k·c FLOPs. Expert products are one grouped product on CUDA
in bf16, elsewhere one for each expert's slice, which asks the device for the counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.layout.weights import Box
from longspan.model.config import MoeConfig
from longspan.model.part import ALL, ModelPart

_ALIGNMENT_BYTES = 16  # of every line of a grouped product's matrices


class Routing(NamedTuple):
    """Where the local tokens of one layer go.

    Attributes:
        experts: the experts of each token, best first.
        weights: the factors of their outputs, without gradient here where they are only looked at.
        counts: tokens that chose each expert.
        kept: whether the expert has room for the token; None: always.
        scores: Σ over local tokens of each expert's score, with gradient; None where no loss needs it.
    """

    experts: Int64[Tensor, "b l k"]
    weights: Float[Tensor, "b l k"]
    counts: Int64[Tensor, " e"]
    kept: Bool[Tensor, "b l k"] | None
    scores: Float[Tensor, " e"] | None


class Order(NamedTuple):
    """(token, choice) slots sorted by expert, those without room left out, and rows of each expert."""

    slots: Int64[Tensor, " r"]
    counts: Int64[Tensor, " e"]


def route(
    x: Float[Tensor, "b l c"], weight: Float[Tensor, "e c"], bias: Float[Tensor, " e"] | None, config: MoeConfig
) -> Routing:
    """Chooses each token's experts. `bias` joins the scores in the choice alone."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide))
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    seen = scores.detach()
    experts = (seen if bias is None else seen + bias).topk(config.experts_per_token).indices
    weights = scores.gather(-1, experts)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = count(experts, config.num_experts)
    kept = None
    if config.capacity_factor is not None:
        share = config.experts_per_token * x.shape[1] / config.num_experts
        kept = _first(experts, config.num_experts, math.ceil(config.capacity_factor * share))
    total = None
    if config.balance in ("aux", "aux_pooled"):
        if config.score == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        total = scores.sum((0, 1))
    return Routing(experts, weights, counts, kept, total)


def count(experts: Int64[Tensor, ...], num_experts: int) -> Int64[Tensor, " e"]:
    """How often each expert occurs."""
    flat = experts.flatten()  # bincount would ask a GPU for its largest value
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def _first(experts: Int64[Tensor, "b l k"], num_experts: int, limit: int) -> Bool[Tensor, "b l k"]:
    """Whether a slot is among the first `limit` of its expert in its row."""
    row = torch.arange(experts.shape[0], device=experts.device)
    keys = (experts + num_experts * row[:, None, None]).flatten()
    slots = keys.argsort(stable=True)
    sizes = count(keys, num_experts * experts.shape[0])
    place = torch.arange(keys.shape[0], device=keys.device) - (sizes.cumsum(0) - sizes)[keys[slots]]
    return torch.empty_like(keys).scatter_(0, slots, place).view_as(experts) < limit


def arrange(experts: Int64[Tensor, "n k"], num_experts: int, kept: Bool[Tensor, "n k"] | None = None) -> Order:
    """Sorts slots by expert, tokens of one expert in their own order."""
    slots = experts.flatten().argsort(stable=True)
    if kept is None:
        return Order(slots, count(experts, num_experts))
    return Order(slots[kept.flatten()[slots]], count(experts[kept], num_experts))


def gather(x: Float[Tensor, "n c"], order: Order, experts_per_token: int) -> Float[Tensor, "r c"]:
    """The tokens' rows in expert order, each as often as it has experts."""
    # By way of all slots: the backward then adds up a token's k gradients in their order, the same every time.
    slots = x[:, None].expand(-1, experts_per_token, -1).reshape(-1, x.shape[-1])
    return slots.index_select(0, order.slots)


def compute_experts(
    rows: Float[Tensor, "r c"],
    counts: Int64[Tensor, " e"],
    gate: Float[Tensor, "e inner c"],
    up: Float[Tensor, "e inner c"],
    down: Float[Tensor, "e c inner"],
) -> Float[Tensor, "r c"]:
    """The swiglu of each row's expert. `rows` are sorted by expert, the first counts[0] of the first one given."""
    product = _grouped(counts) if _can_group(rows, gate, up, down) else _sliced(counts)
    return product(F.silu(product(rows, gate)) * product(rows, up), down)


def combine(rows: Float[Tensor, "r c"], order: Order, weights: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
    """The sum of each token's rows, weighted; a slot that is not in the order adds nothing."""
    # Not index_copy_, which would keep the rows for its backward.
    slots = rows.new_zeros(weights.numel(), rows.shape[-1]).index_put_((order.slots,), rows)
    return torch.bmm(weights.to(rows.dtype)[:, None], slots.view(*weights.shape, rows.shape[-1]))[:, 0]


def _can_group(rows: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product takes these; without rows there is nothing for it to do."""
    if not rows.is_cuda or rows.shape[0] == 0 or any(x.dtype != torch.bfloat16 for x in (rows, *weights)):
        return False
    return all(size * rows.itemsize % _ALIGNMENT_BYTES == 0 for weight in weights for size in weight.shape[1:])


def _grouped(counts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    ends = counts.cumsum(0).to(torch.int32)
    return lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _sliced(counts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    sizes = counts.tolist()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        # unbind, not an index for each expert: its backward makes one gradient, not one of full size each.
        pairs = zip(rows.split(sizes), weight.unbind(0), strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in pairs])

    return product


def balance_loss(
    config: MoeConfig, counts: Int64[Tensor, "layers e"], scores: Float[Tensor, "layers e"]
) -> Float[Tensor, ""]:
    """The auxiliary loss of all sparse layers, summed over local tokens: see the module.

    Args:
        counts: tokens that chose each expert, of the whole batch on all ranks.
        scores: each expert's scores summed over the local tokens, with gradient.
    """
    num_choices = counts.sum(-1, keepdim=True).clamp_min(1)
    shares = counts.to(scores.dtype) * config.experts_per_token / num_choices
    if config.balance == "aux_pooled":
        shares, scores = shares.mean(0), scores.mean(0)
    return config.aux_coef * config.num_experts * (shares * scores).sum()


def reset_balance(model: nn.Module) -> None:
    """Biases and noted load to zero: a model that comes from the meta device has no values there."""
    for name, buffer in model.named_buffers():
        if name.endswith(("selection_bias", "expert_load")):
            buffer.zero_()


class Experts(nn.Module):
    """The weights of this rank's experts, stacked along dim 0; of each, tensor ranks hold some inner channels."""

    def __init__(self, config: MoeConfig, hidden_size: int, part: ModelPart = ALL) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.here, self.channels = part.experts.share(config.num_experts), part.split.share(config.inner_size)
        into, back = (len(self.channels), hidden_size), (hidden_size, len(self.channels))
        self.gate = nn.Parameter(torch.empty(len(self.here), *into))
        self.up = nn.Parameter(torch.empty(len(self.here), *into))
        self.down = nn.Parameter(torch.empty(len(self.here), *back))

    def forward(self, rows: Float[Tensor, "r c"], counts: Int64[Tensor, " e"]) -> Float[Tensor, "r c"]:
        """`compute_experts` with these weights; of split channels this rank's addend."""
        return compute_experts(rows, counts, self.gate, self.up, self.down)

    def boxes(self) -> dict[str, Box]:
        """Where the parameters stand in the whole ones."""
        experts, inner, width = self.config.num_experts, self.config.inner_size, self.hidden_size
        into = Box((experts, inner, width), (self.here.start, self.channels.start, 0))
        back = Box((experts, width, inner), (self.here.start, 0, self.channels.start))
        return {"gate": into, "up": into, "down": back}


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is one of `Experts`."""
    return ".experts." in name


class Moe(nn.Module):
    """The channel mixer of a sparse layer: its output, and where tokens went.

    `tile`, as for `parts.Mlp`: so many tokens of the sequence go through the experts at a time; they are routed all at
    once, so that neither balance nor capacity knows of tiles.

    Args:
        config: experts, router and balance.
        hidden_size: width c of the tokens.
        shared: the shared expert, where the config has one.
        part: which experts, and which channels of each, this rank holds.
    """

    selection_bias: Tensor | None

    def __init__(
        self, config: MoeConfig, hidden_size: int, shared: nn.Module | None = None, part: ModelPart = ALL
    ) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.tile: int | None = None
        self.router = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config, hidden_size, part)
        self.shared = shared
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if config.shared_gate else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.balance == "bias" else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Float[Tensor, "b l c"]) -> tuple[Float[Tensor, "b m c"], Routing]:
        """Mixes the channels of every token by its own experts; m is l unless channels are split."""
        # First, so that only the weighted sum at the end is left out where a block is computed again.
        shared = None if self.shared is None else self.shared(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(self.part.split.own(x, dim=1)).sigmoid() * shared
        routing = route(x, self.router.weight, self.selection_bias, self.config)
        mixed = self.part.split.scatter(self._tiled(x, routing))
        if shared is not None:
            mixed = shared + mixed
        return mixed, routing._replace(weights=routing.weights.detach())

    def _tiled(self, x: Tensor, routing: Routing) -> Tensor:
        kept = [] if routing.kept is None else [routing.kept]
        parts = (x, routing.experts, routing.weights, *kept)
        if self.tile is None or self.tile >= x.shape[1]:
            return self._mix(*parts)
        tiles = zip(*(part.split(self.tile, dim=1) for part in parts), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._mix(*tile) for tile in tiles], dim=1)
        return torch.cat([checkpoint(self._mix, *tile, use_reentrant=False) for tile in tiles], dim=1)

    def _mix(self, x: Tensor, experts: Tensor, weights: Tensor, kept: Tensor | None = None) -> Tensor:
        tokens, experts, weights = x.flatten(0, 1), experts.flatten(0, 1), weights.flatten(0, 1)
        order = arrange(experts, self.config.num_experts, None if kept is None else kept.flatten(0, 1))
        rows = gather(tokens, order, self.config.experts_per_token)
        rows = self.part.experts.apply(self.experts, rows, order.counts)
        return combine(rows, order, weights).view_as(x)

    @torch.no_grad()
    def move_bias(self, load: Int64[Tensor, " e"]) -> None:
        """One step of the selection bias against the load of the whole batch of an optimiser step."""
        assert self.selection_bias is not None
        load = load.to(torch.float64)
        self.selection_bias += self.config.bias_speed * torch.sign(load.mean() - load).to(self.selection_bias.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.selection_bias
        super()._apply(fn, recurse)
        after = self.selection_bias
        # Steps of 0.001 would be lost in bf16: the bias stays in fp32 whatever the model is cast to.
        if before is not None and after is not None and after.dtype != before.dtype:
            self.selection_bias = before.to(after.device)
        return self
