"""Any plan has the loss and every gradient of one process, within 1e-5 of the largest gradient, in fp32."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from longspan.context.methods import METHODS
from longspan.layout.weights import whole
from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import build
from longspan.model.offload import ActivationOffload
from longspan.plan.plan import Plan
from longspan.train.data.batches import NO_LABEL, Batch
from tests.ranks import run_ranks

CONFIG = DecoderConfig(
    num_layers=3,
    hidden_size=24,
    vocab_size=61,
    attention=AttentionConfig(num_heads=4, head_dim=6, num_kv_heads=2, qk_norm_eps=1e-6),
    mlp=MlpConfig(inner_size=40),
    tie_embeddings=True,
)
LENGTH, ROWS = 37, 6
DOCUMENTS = ((11, 19, 7), (37,), (5, 5, 27), (13, 24), (36, 1), (20, 17))


def rows(documents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
    if documents:
        for row, lengths in enumerate(DOCUMENTS):
            labels[row, torch.tensor(lengths).cumsum(0) - 1] = NO_LABEL
    return tokens, labels


def reference(config: DecoderConfig, documents: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """One process, the plain model, one document at a time."""
    model = build(config, device="cpu", seed=3)
    tokens, labels = rows(documents)
    total, count = torch.zeros(()), int((labels != NO_LABEL).sum())
    for row in range(ROWS):
        start = 0
        for length in DOCUMENTS[row] if documents else (LENGTH,):
            part = slice(start, start + length)
            logits = model(tokens[row : row + 1, part])
            wanted = labels[row : row + 1, part].flatten()
            total = total + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), wanted, ignore_index=NO_LABEL, reduction="sum"
            )
            start += length
    (total / count).backward()
    return float(total.detach()) / count, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def micros(plan: Plan, rank: int, num_micro: int, documents: bool) -> list[tuple[Batch, Any]]:
    tokens, labels = rows(documents)
    of_axes = rank % (plan.data * plan.expert * plan.context * plan.tensor)  # pipelines are outermost
    data_rank = of_axes // (plan.context * plan.tensor)
    parts = plan.data * plan.expert * num_micro
    assert ROWS % parts == 0
    batches = []
    for micro in range(num_micro):
        first = (data_rank * num_micro + micro) * (ROWS // parts)
        chosen = slice(first, first + ROWS // parts)
        t, y, lengths = tokens[chosen], labels[chosen], None
        if documents:
            t, y = t.reshape(1, -1), y.reshape(1, -1)
            lengths = tuple(n for row in DOCUMENTS[chosen] for n in row)
        count = int((y != NO_LABEL).sum())
        batches.append(
            (
                Batch(
                    tokens=t, labels=y, lengths=lengths, num_labels=count, position=0, micro=micro, num_micro=num_micro
                ),
                None,
            )
        )
    return batches


def one_rank(
    rank: int,
    world: int,
    plan: Plan,
    config: DecoderConfig,
    num_micro: int,
    documents: bool,
    built: bool,
    device: str = "cpu",
) -> Any:
    from longspan.train.config import TrainConfig
    from longspan.train.loop import Trainer

    with mock.patch.dict(ActivationOffload.__init__.__kwdefaults__, min_bytes=0):
        trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), config, plan, torch.device(device))
    batches = micros(plan, rank, num_micro, documents)
    if built:  # as the data worker does it
        batches = [(batch, trainer.prepare(batch)) for batch, _ in batches]
    loss = trainer.gradients(batches)
    norm, boxes, grads = float(trainer.gradient_norm()), trainer.model.boxes(), {}
    for name, parameter in trainer.model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        part = (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu().clone()
        grads[name] = (boxes.get(name, whole(tuple(part.shape))), part)
    return loss, norm, grads


def compare(results: list[Any], loss: float, grads: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Every rank's loss, norm and part of every gradient; together the parts are all of them."""
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    seen = {name: torch.zeros(grad.shape, dtype=torch.bool) for name, grad in grads.items()}
    for got_loss, got_norm, got in results:
        assert abs(got_loss - loss) <= tolerance * abs(loss)
        assert abs(got_norm - norm) <= tolerance * norm
        for name, (box, part) in got.items():
            assert box.shape == tuple(grads[name].shape), name
            region = tuple(slice(start, start + n) for start, n in zip(box.start, part.shape, strict=True))
            error = (part - grads[name][region]).abs().max() / grads[name].abs().max()
            assert error <= tolerance, (name, float(error))
            seen[name][region] = True
    assert all(mask.all() for mask in seen.values()), [name for name, mask in seen.items() if not mask.all()]


def assert_parity(
    plan: Plan,
    world: int,
    config: DecoderConfig = CONFIG,
    num_micro: int = 1,
    documents: bool = False,
    built: bool = False,
) -> None:
    results = run_ranks(one_rank, world, plan.fit(world), config, num_micro, documents, built)
    compare(results, *reference(config, documents))


PLANS = [
    (1, Plan()),
    (2, Plan(context=2)),
    (2, Plan(context=2, shard="zero2", method="ring")),
    (2, Plan(data=2, shard="zero3")),
    (2, Plan(data=2)),
    (3, Plan(context=3, shard="zero3", method="zigzag", recompute="attention")),
    (3, Plan(data=3, shard="zero2", recompute="full")),
    (4, Plan(data=2, context=2, shard="zero3", recompute="attention", mlp_tile=8)),
    (4, Plan(data=1, context=4, layout="striped")),
    (1, Plan(offload="layers")),
    (1, Plan(offload="both", recompute="attention")),
    (2, Plan(data=2, shard="zero3", recompute="full", offload="activations")),
    (2, Plan(context=2, shard="zero2", recompute="attention", offload="activations")),
]


@pytest.mark.parametrize(("world", "plan"), PLANS, ids=lambda x: str(x) if isinstance(x, int) else None)
def test_loss_and_every_gradient_equal_one_process(world: int, plan: Plan) -> None:
    assert_parity(plan, world)


@pytest.mark.parametrize("built", [False, True])
def test_packed_documents_and_micro_batches(built: bool) -> None:
    assert_parity(Plan(data=1, context=2, shard="zero2"), 2, num_micro=3, documents=True, built=built)


def test_streamed_layers_add_up_micro_batches() -> None:
    assert_parity(Plan(offload="both", recompute="full"), 1, num_micro=3, documents=True)


def test_packed_documents_over_data_and_context() -> None:
    assert_parity(Plan(data=2, context=2, shard="zero3"), 4, num_micro=3, documents=True)


def test_windows_untied_head_and_learned_positions() -> None:
    from longspan.model.config import LearnedPositionsConfig

    config = replace(
        CONFIG, windows=(9, None, 9), tie_embeddings=False, positions=LearnedPositionsConfig(max_positions=64)
    )
    assert_parity(Plan(context=2), 2, config=config)


def by_name(rank: int, world: int, plans: list[Plan]) -> list[Any]:
    return [one_rank(rank, world, plan.fit(world), CONFIG, 1, False, False) for plan in plans]


def test_every_method_and_layout_by_name() -> None:
    plans = [Plan(method=name) for name in (*METHODS, "usp:2", "ulysses+burst", "auto")]
    plans += [Plan(method="ring", layout="striped"), Plan(layout="zigzag"), Plan(layout="balanced")]
    loss, grads = reference(CONFIG, False)
    for results in zip(*run_ranks(by_name, 2, plans), strict=True):
        compare(list(results), loss, grads)


def test_the_comparison_bites() -> None:
    """A context that forgets the other rank's keys does not pass."""
    with pytest.raises(AssertionError):
        loss, _ = reference(CONFIG, False)
        got_loss = run_ranks(forgetful_rank, 2)[0][0]
        assert abs(got_loss - loss) <= 1e-5 * abs(loss)


def forgetful_rank(rank: int, world: int) -> Any:
    from longspan.model.local import LocalContext
    from longspan.train import loop

    class Forgetful(loop.SequenceContext):
        def attend(self, q, k, v, **options):
            return LocalContext(q.shape[1]).attend(q, k, v, **options)

    def forget(length, prepare, mesh, device, *, rows):
        mask = loop.masks.causal(length)
        return Forgetful(mask, mesh.context.group, device=device), prepare.of(mask)

    loop.make_context = forget
    return one_rank(rank, world, Plan(context=2), CONFIG, 1, False, False)
