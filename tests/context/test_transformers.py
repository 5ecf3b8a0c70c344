"""Stock transformers models on split sequences: loss and every gradient are the unsplit model's."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longspan.context.hf_attention import IGNORED, attach, shard_batch
from tests.context.hf_cases import MIXED, NUM_TOKENS, VOCAB, WINDOW, Case
from tests.ranks import run_ranks

Found = tuple[float, dict[str, Tensor]]  # loss, and the gradient of every parameter


@lru_cache
def _unsplit(index: int) -> Found:
    case = CASES[index]
    model, batch = case.build(), case.batch()
    model.set_attn_implementation("eager")
    mask = case.mask()
    if mask is not None:
        seen = torch.zeros(NUM_TOKENS, NUM_TOKENS).masked_fill(~mask.dense(), torch.finfo(torch.float32).min)
        batch["attention_mask"] = seen.expand(case.rows, 1, -1, -1)
    loss = model(**batch, use_cache=False).loss  # with a cache transformers would not look for documents
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _gradients(model: Any) -> dict[str, Tensor]:
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _split(case: Case, group: dist.ProcessGroup | None) -> Found:
    model = case.build()
    split = attach(model, group, method=case.method, layout=case.layout)
    if case.checkpointing:
        model.train()
        # Renamed between the releases that are supported.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    local = shard_batch(case.batch(), split, mask=case.mask())
    loss = model(**local).loss
    loss.backward()
    found = _gradients(model)
    loss = loss.detach()
    if group is not None:
        for x in (loss, *found.values()):
            dist.all_reduce(x, group=group)
    return float(loss), found


def results(rank: int, world: int, cases: list[Case]) -> tuple[list[Found], list[str]]:
    """Loss and gradients, summed over the ranks, of every case; and what is refused on this rank."""
    found = [_split(case, dist.group.WORLD) for case in cases]
    return (found if rank == 0 else []), _refused_on_ranks(rank, world)


def _refused_on_ranks(rank: int, world: int) -> list[str]:
    """What is said of a batch that differs on one rank, of calls that fit on some ranks only, and of a short batch.

    A rank that waited for another would time out. Last comes a call that fits on all of them.
    """
    case = Case("")
    model, batch = case.build(), case.batch()
    split = attach(model, dist.group.WORLD, layout="contiguous", method="ring")
    said = []
    mine = batch | {"input_ids": (batch["input_ids"] + (rank == 1)) % VOCAB}
    local = shard_batch(batch, split)
    padded = torch.ones_like(local["input_ids"])
    padded[:, -1] = rank != 1
    unplaced = {name: x for name, x in local.items() if name != "position_ids"}
    for call in (
        lambda: shard_batch(mine, split),
        lambda: model(**(unplaced if rank == 1 else local)),  # left out on one rank
        lambda: model(**unplaced),  # left out on all: right on rank 0
        lambda: model(**(batch if rank == 0 else local)),
        lambda: model(**local | {"output_attentions": rank == 1}),
        lambda: model(**local | {"attention_mask": padded}),
        lambda: shard_batch({"input_ids": batch["input_ids"][:, : world - 1]}, split),
        lambda: model(**shard_batch(batch, split)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


CASES = [
    Case("llama, rows", rows=2),
    Case("llama, ring", method="ring", ignored=0.3),
    Case("llama, zigzag", method="zigzag", ignored=0.3, rows=2),
    Case("llama, documents", documents=(5, 11, 7), method="zigzag"),
    Case("llama, biases and tied", config={"attention_bias": True, "tie_word_embeddings": True}, layout="striped"),
    Case("llama, checkpointing", documents=(9, 14), checkpointing=True),
    Case("llama, prefix", prefix=6, layout="zigzag"),
    Case("qwen3", "Qwen3", documents=(1, 21, 1), ignored=0.5),
    Case("qwen3, zigzag", "Qwen3", method="zigzag"),
    Case("qwen3, windows in some layers", "Qwen3", MIXED, documents=(16, 7), method="ring"),
    Case("mistral, window", "Mistral", WINDOW, method="ring"),
    Case("mistral, window in zigzag", "Mistral", WINDOW, method="zigzag", documents=(16, 7), rows=2),
    Case("mistral, no window", "Mistral", {"sliding_window": None}),
]
EACH_CASE = pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])


def error(found: Found, expected: Found) -> float:
    """Largest relative difference, in the loss and in each parameter's gradient by its own largest."""
    assert found[1].keys() == expected[1].keys()
    grads = [float((x - expected[1][name]).abs().max() / expected[1][name].abs().max()) for name, x in found[1].items()]
    return max(abs(found[0] / expected[0] - 1), *grads)


@lru_cache
def _on_ranks(world: int) -> tuple[list[Found], list[list[str]]]:
    """All cases at once: each rank takes seconds to import transformers."""
    found = run_ranks(results, world, CASES, timeout_s=250)
    return found[0][0], [said for _, said in found]


@EACH_CASE
@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_are_the_unsplit_models(world: int, index: int) -> None:
    assert error(_on_ranks(world)[0][index], _unsplit(index)) <= 1e-5


@EACH_CASE
def test_one_process_without_a_group(index: int) -> None:
    assert error(_split(CASES[index], None), _unsplit(index)) <= 1e-5


@pytest.mark.parametrize("wrong", ["documents", "window", "labels", "prefix"])
def test_a_difference_is_seen(wrong: str) -> None:
    """Documents, a window, labels or a prefix left out make the error larger by orders of magnitude."""
    name = {"documents": "qwen3", "window": "mistral, window", "labels": "llama, ring", "prefix": "llama, prefix"}[
        wrong
    ]
    index = next(i for i, case in enumerate(CASES) if case.name == name)
    change = {"documents": {"documents": (NUM_TOKENS,)}, "window": {"config": {"sliding_window": None}}}
    change |= {"labels": {"ignored": 0.0}, "prefix": {"prefix": None}}
    assert error(_split(CASES[index]._replace(**change[wrong]), None), _unsplit(index)) > 1e-2


@pytest.mark.parametrize("world", [2, 3])
def test_refused_on_every_rank(world: int) -> None:
    others = "all ranks must use one call of the model, with all that shard_batch returned, but ranks"
    own = "position_ids must be those of this rank's"
    for rank, said in enumerate(_on_ranks(world)[1]):
        assert "all ranks must use one batch" in said[0]
        assert said[1].startswith(own if rank == 1 else others)
        assert said[2].startswith(others if rank == 0 else own)
        assert said[3].startswith(own if rank == 0 else others)
        assert said[4].startswith("output_attentions must not reach" if rank == 1 else others)
        assert said[5].startswith("attention_mask must be all ones" if rank == 1 else others)
        assert f"each of {world} ranks needs a token, got {world - 1}" in said[6]
        assert not said[7] and not any("\n" in message for message in said)


def test_shares_of_a_batch_join_to_its_shifted_labels() -> None:
    case = Case("", ignored=0.4, rows=2)
    batch, model = case.batch(), case.build()
    local = shard_batch(batch, attach(model))
    expected = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    assert torch.equal(local["shift_labels"], expected) and torch.equal(local["labels"], expected)
    assert local["num_items_in_batch"] == (expected != IGNORED).sum() and local["use_cache"] is False
    assert set(local) == {"input_ids", "position_ids", "labels", "shift_labels", "num_items_in_batch", "use_cache"}


def test_steps_of_several_batches_share_one_count() -> None:
    """Losses of two batches, each over the targets of both, add up to the mean over both."""
    first, second = Case("", ignored=0.5), Case("", ignored=0.1, documents=(9, 14))
    model = first.build()
    split = attach(model)
    total = sum(int((case.batch()["labels"][:, 1:] != IGNORED).sum()) for case in (first, second))
    losses, means, counts = [], [], []
    for case in (first, second):
        losses.append(model(**shard_batch(case.batch() | {"num_items_in_batch": torch.tensor(total)}, split)).loss)
        local = shard_batch(case.batch(), split)
        means.append(model(**local).loss)
        counts.append(local["num_items_in_batch"])
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / total
    assert torch.allclose(torch.stack(losses).sum(), torch.as_tensor(expected), rtol=1e-5)


def test_embeddings_in_place_of_tokens_and_shifted_labels() -> None:
    case = Case("", rows=2)
    batch, model = case.batch(), case.build()
    split = attach(model)
    expected = model(**shard_batch(batch, split)).loss
    given = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "shift_labels": F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:],
        "attention_mask": torch.ones_like(batch["labels"]),
    }
    assert torch.allclose(model(**shard_batch(given, split)).loss, expected, rtol=1e-6)


def test_autocast_is_obeyed() -> None:
    case = Case("")
    batch, model = case.batch(), case.build()
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(**batch, use_cache=False).loss
        loss = model(**shard_batch(batch, attach(model))).loss
    assert torch.allclose(loss, stock, rtol=0.01)


def test_a_copy_of_a_model_is_split_the_same_way() -> None:
    case = Case("")
    model = case.build()
    local = shard_batch(case.batch(), attach(model))
    assert torch.equal(copy.deepcopy(model)(**local).loss, model(**local).loss)


def test_two_models_do_not_share_a_split() -> None:
    one, other = Case("", documents=(9, 14)), Case("")
    models = [case.build() for case in (one, other)]
    local = [shard_batch(case.batch(), attach(model)) for case, model in zip((one, other), models, strict=True)]
    losses = [model(**batch).loss for model, batch in zip(models, local, strict=True)]
    again = models[0](**local[0]).loss
    assert torch.equal(losses[0], again) and not torch.isclose(losses[0], losses[1])
