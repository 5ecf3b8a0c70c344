"""The mixture of experts against its formula in float64; balance, capacity, tiles, recomputation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig, MoeConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.moe import Moe, arrange, combine, compute_experts, gather
from longspan.model.recompute import apply_recompute
from tests.oracles.moe import mixture, scores_of, switch_loss

MOE = MoeConfig(num_experts=7, experts_per_token=3, inner_size=5)
WIDTH = 11
BASE = DecoderConfig(
    num_layers=4,
    hidden_size=WIDTH,
    vocab_size=29,
    attention=AttentionConfig(num_heads=2, head_dim=6),
    mlp=MlpConfig(inner_size=13),
    moe=MOE,
    dense_layers=(1,),
    init_std=0.5,
)


def decoder(**changes: Any) -> DecoderLM:
    return build(dataclasses.replace(BASE, moe=dataclasses.replace(MOE, **changes)), device="cpu", seed=2)


def ids(length: int = 13, rows: int = 2) -> torch.Tensor:
    return torch.randint(29, (rows, length), generator=torch.Generator().manual_seed(length))


def layer(**changes: Any) -> Moe:
    """A single layer in float64, its router far from even."""
    torch.manual_seed(4)
    moe = Moe(dataclasses.replace(MOE, **changes), WIDTH).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return moe


def states(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def formula(moe: Moe, x: torch.Tensor, capacity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    parts = (moe.router.weight, moe.experts.gate, moe.experts.up, moe.experts.down)
    config = moe.config
    return mixture(
        x.detach().numpy(),
        *(part.detach().numpy() for part in parts),
        k=config.experts_per_token,
        score=config.score,
        renormalise=config.renormalise,
        bias=None if moe.selection_bias is None else moe.selection_bias.numpy(),
        capacity=capacity,
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("balance", ["none", "bias"])
def test_output_and_choice_are_the_formulas(score: str, renormalise: bool, balance: str) -> None:
    moe, x = layer(score=score, renormalise=renormalise, balance=balance), states()
    if moe.selection_bias is not None:
        moe.selection_bias.copy_(torch.linspace(-0.6, 0.6, 7))
    out, routing = moe(x)
    expected, chosen = formula(moe, x)
    assert np.array_equal(routing.experts.numpy(), chosen)
    assert np.array_equal(routing.counts.numpy(), np.bincount(chosen.ravel(), minlength=7))
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    moe, x = layer(balance="bias"), states()
    before = moe(x)[1]
    assert moe.selection_bias is not None
    moe.selection_bias[5] = 10.0
    after = moe(x)[1]
    assert (after.experts == 5).any(-1).all() and not (before.experts == 5).any(-1).all()
    assert after.weights.max() <= 1


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2])
def test_an_expert_takes_the_first_tokens_of_each_row_up_to_its_capacity(factor: float) -> None:
    moe, x = layer(capacity_factor=factor), states()
    limit = math.ceil(factor * 3 * 13 / 7)
    out, routing = moe(x)
    expected, _ = formula(moe, x, limit)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert routing.kept is not None and not routing.kept.all()
    # Later tokens and other rows change nothing.
    other = x.clone()
    other[0, 7:], other[1] = 1.0, 2.0
    torch.testing.assert_close(moe(other)[0][0, :7], out[0, :7])


@pytest.mark.parametrize("changes", [{}, {"score": "sigmoid", "balance": "aux"}, {"capacity_factor": 0.5}])
def test_gradients(changes: dict[str, Any]) -> None:
    moe, x = layer(**changes), states(1, 5).requires_grad_()
    parts = [x, *moe.parameters()]

    def run(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, routing = moe(x)
        return (out,) if routing.scores is None else (out, routing.scores)

    assert torch.autograd.gradcheck(run, parts)


def test_shared_expert_and_its_gate() -> None:
    model = decoder(shared_inner_size=9, shared_gate=True).double()
    moe = model.blocks[0].mlp
    assert isinstance(moe, Moe) and moe.shared is not None and moe.shared_gate is not None
    x = states()
    expected = formula(moe, x)[0] + (moe.shared_gate(x).sigmoid() * moe.shared(x)).detach().numpy()
    np.testing.assert_allclose(moe(x)[0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_some_experts_of_a_layer_compute_their_own_rows() -> None:
    moe, x = layer(), states()[0]
    routing = moe(x[None])[1]
    order = arrange(routing.experts[0], 7)
    rows = gather(x, order, 3)
    weights = (moe.experts.gate, moe.experts.up, moe.experts.down)
    bounds, parts = order.counts.cumsum(0).tolist(), []
    for first, last in ((0, 3), (3, 7)):
        mine = rows[bounds[first - 1] if first else 0 : bounds[last - 1]]
        parts.append(compute_experts(mine, order.counts[first:last], *(w[first:last] for w in weights)))
    torch.testing.assert_close(combine(torch.cat(parts), order, routing.weights[0]), moe(x[None])[0][0])


@pytest.mark.parametrize("balance", ["aux", "aux_pooled"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_loss_is_the_formula(balance: str, score: str) -> None:
    model = decoder(balance=balance, aux_coef=0.37, score=score).double()
    seen: list[tuple[torch.Tensor, Any]] = []
    for index in BASE.sparse_layers:
        model.blocks[index].mlp.register_forward_hook(  # pyright: ignore[reportAttributeAccessIssue]
            lambda module, args, out: seen.append((args[0], (module, out[1])))
        )
    x = ids()
    losses = model.losses(x, x)
    scores, chosen = [], []
    for states_, (moe, routing) in seen:
        router = moe.router.weight.detach().numpy()
        found = np.stack([scores_of(t, router, score) for t in states_.detach().numpy().reshape(-1, WIDTH)])
        scores.append(found / found.sum(-1, keepdims=True))
        chosen.append(routing.experts.numpy().reshape(-1, 3))
    expected = 0.37 * x.numel() * switch_loss(scores, chosen, pooled=balance == "aux_pooled")
    assert losses.aux is not None
    assert losses.aux.item() == pytest.approx(expected, rel=1e-12)
    assert model.loss(x, x)[0].item() == pytest.approx(losses.cross_entropy.item() + expected, rel=1e-12)
    # Without a loss of its own the cross-entropy is the same, and the router learns of balance only here.
    plain = decoder(score=score).double()
    assert torch.equal(plain.losses(x, x).cross_entropy, losses.cross_entropy) and plain.losses(x, x).aux is None


@pytest.mark.parametrize("changes", [{"balance": "aux"}, {"capacity_factor": 0.7, "shared_inner_size": 4}])
@pytest.mark.parametrize("how", ["full", "attention", 1, 4, 13])
def test_recomputation_and_tiles_change_nothing(changes: dict[str, Any], how: Any) -> None:
    def gradients(model: DecoderLM) -> list[torch.Tensor]:
        return list(torch.autograd.grad(model.loss(ids(), ids())[0], list(model.parameters())))

    plain, other = decoder(**changes), decoder(**changes)
    if isinstance(how, str):
        apply_recompute(other, how)  # pyright: ignore[reportArgumentType]
    else:
        other.mlp_tile = how
    for a, b in zip(gradients(plain), gradients(other), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(other(ids()), plain(ids()))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bias_moves_once_a_step_by_the_load_of_all_micro_batches(recompute: Any) -> None:
    model = decoder(balance="bias", bias_speed=0.25)
    apply_recompute(model, recompute)
    loads = []
    for index in BASE.sparse_layers:
        moe = model.blocks[index].mlp
        moe.register_forward_hook(  # pyright: ignore[reportAttributeAccessIssue]
            lambda module, args, out, index=index: loads.append((index, out[1].counts))
        )
    for length in (13, 5):
        model.loss(ids(length), ids(length))[0].backward()
    assert model.expert_load is not None
    total = torch.zeros(4, 7, dtype=torch.int64)
    for index, counts in loads:
        total[index] += counts // (2 if recompute == "full" else 1)
    assert int(model.expert_load.sum()) == 2 * 18 * 3 * len(BASE.sparse_layers)
    with torch.no_grad():
        model.loss(ids(), ids())  # an evaluation is not training
    model.balance()
    for index in BASE.sparse_layers:
        bias = model.get_buffer(f"blocks.{index}.mlp.selection_bias")
        load = total[index].double()
        assert torch.equal(bias, 0.25 * torch.sign(load.mean() - load).float()), index
    assert not model.expert_load.any()
    before = [x.clone() for x in model.buffers()]
    decoder().balance()  # nothing to do
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_bias_evens_the_load() -> None:
    moe, x = layer(balance="bias", bias_speed=0.005, score="sigmoid"), states(2, 200) + 0.5
    with torch.no_grad():
        moe.router.weight *= 0.2

    def spread() -> float:
        counts = moe(x)[1].counts.double()
        return float(counts.std() / counts.mean())

    before = spread()
    for _ in range(200):
        moe.move_bias(moe(x)[1].counts)
    assert spread() < 0.2 * before


def test_bias_is_fp32_in_any_model_and_zero_after_initialisation() -> None:
    model = build(dataclasses.replace(BASE, moe=dataclasses.replace(MOE, balance="bias")), device="cpu")
    low = model.to(torch.bfloat16)
    moe = low.blocks[0].mlp
    assert isinstance(moe, Moe) and moe.selection_bias is not None
    assert moe.selection_bias.dtype == torch.float32 and not moe.selection_bias.any()
    assert "blocks.0.mlp.selection_bias" in low.state_dict() and "expert_load" not in low.state_dict()
    assert low(ids()).dtype == torch.bfloat16


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    moe, x = layer(balance="bias"), states()
    assert moe.selection_bias is not None
    moe.selection_bias[2] = -100.0
    out, routing = moe(x)
    out.square().sum().backward()
    assert routing.counts[2] == 0
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None and not parameter.grad[2].any() and parameter.grad[1].any()


def test_no_tokens_at_all() -> None:
    model = decoder(balance="aux", shared_inner_size=3)
    total, count = model.loss(torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int64))
    total.backward()
    assert total.item() == 0 and int(count) == 0
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"experts_per_token": 8}, r"experts_per_token must lie in 1\.\.7, got 8"),
        ({"shared_gate": True}, "shared_gate needs a shared expert"),
        ({"balance": "even"}, "balance must be one of none, aux, aux_pooled, bias, got 'even'"),
        ({"score": "tanh"}, "score must be softmax or sigmoid"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"bias_speed": 0.0}, "bias_speed must be positive"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(MOE, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": None}, "moe, which is None"),
        ({"dense_layers": (4,)}, r"some of the layers 0\.\.3"),
        ({"dense_layers": (2, 1)}, "in order"),
        ({"dense_layers": (0, 1, 2, 3)}, "not all"),
    ],
)
def test_wrong_layers_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BASE, **changes)
