"""What `hf_attention` refuses: batches, calls, masks and models, each by name and with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from longspan.attention import masks
from longspan.context import hf_attention, hf_refusals
from longspan.context.hf_attention import attach, register, shard_batch
from tests.context.hf_cases import NUM_TOKENS, WINDOW, Case, small_config, small_model


def test_an_implementation_by_name_needs_a_split() -> None:
    register()
    config = small_config()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longspan")
    batch = Case("").batch()
    with pytest.raises(ValueError, match="call attach"):
        model(**batch)
    split = attach(model)
    with pytest.raises(ValueError, match="call shard_batch"):
        model(**batch)
    assert torch.isfinite(model(**shard_batch(batch, split)).loss)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 3])}, "attention_mask must be all ones.*pack rows"),
        ({"attention_mask": torch.ones(1, NUM_TOKENS)}, "leave attention_mask out"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \(1, 23\).*got \(1, 4\)"),
        ({"labels": torch.zeros(1, 22)}, r"labels must be \(1, 23\)"),
        ({"position_ids": torch.arange(22)}, r"position_ids must be \(b, 23\)"),
        (
            {"input_ids": torch.zeros(1, NUM_TOKENS, dtype=torch.int64), "token_type_ids": 1},
            "got token_type_ids as well",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 23])}, "got cu_seq_lens_q as well.*documents are told by position_ids"),
        ({"use_cache": True}, "use_cache must be False"),
        ({"input_ids": None}, "must have input_ids"),
        ({"input_ids": torch.zeros(23)}, "must have input_ids"),
        ({"inputs_embeds": torch.zeros(1, 23, 24)}, "not both"),
        ({"mask": masks.causal(22)}, "mask must be of the batch's 23 tokens"),
    ],
)
def test_batches_refused(change: dict[str, Any], says: str) -> None:
    batch = Case("", documents=(9, 14)).batch() | change
    mask = batch.pop("mask", None)
    with pytest.raises(ValueError, match=says):
        shard_batch(batch, attach(small_model()), mask=mask)  # pyright: ignore[reportArgumentType]


def test_rows_with_other_documents_are_refused() -> None:
    batch = Case("", rows=2).batch()
    batch["position_ids"] = torch.stack([torch.arange(23), torch.cat([torch.arange(9), torch.arange(14)])])
    with pytest.raises(ValueError, match="same position_ids"):
        shard_batch(batch, attach(small_model()))


def test_labels_need_the_causal_loss() -> None:
    with pytest.raises(ValueError, match="ForCausalLM"):
        shard_batch(Case("").batch(), attach(transformers.LlamaForSequenceClassification(small_config(num_labels=2))))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 3])}, "must be all ones"),
        ({"attention_mask": torch.ones(1, 1, 23, 23)}, "attention_mask must not be a tensor"),
        ({"attention_mask": torch.ones(1, 24)}, "23 and 24"),
        ({"position_ids": torch.arange(23)[None] + 1}, "position_ids must be those"),
        ({"output_attentions": True}, "output_attentions must not reach"),
        ({"cu_seq_lens_q": torch.tensor([0, 23])}, "cu_seq_lens_q must not reach"),
        ({"head_mask": torch.ones(2)}, "head_mask must not reach"),
        ({"position_bias": torch.ones(2)}, r"position_bias must not reach.*a tensor of \(2,\)"),
        ({"is_causal": False}, "must be causal|is_causal must be True"),
    ],
)
def test_calls_refused(options: dict[str, Any], says: str) -> None:
    model = small_model()
    local = shard_batch(Case("").batch(), attach(model))
    with pytest.raises(ValueError, match=says):
        model(**local | options)


def test_dropout_is_refused_in_training_only() -> None:
    model = small_model(attention_dropout=0.1)
    local = shard_batch(Case("").batch(), attach(model))
    model.eval()
    assert torch.isfinite(model(**local).loss)
    model.train()
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.1; set config\.attention_dropout"):
        model(**local)


def test_a_cache_is_refused() -> None:
    model = small_model()
    local = shard_batch(Case("").batch(), attach(model))
    cache = model(**local | {"use_cache": True}).past_key_values
    with pytest.raises(ValueError, match=r"key-value cache.*use_cache=False"):
        model(**local, past_key_values=cache)
    with pytest.raises(ValueError, match=r"local tokens|position_ids"):
        model.generate(Case("").batch()["input_ids"][:, :4], max_new_tokens=2, do_sample=False)


def test_a_window_that_only_the_layer_or_the_mask_knows() -> None:
    """A layer whose window the mask does not have is refused; one that does not know the mask's window gets it."""
    model = small_model("Mistral", **WINDOW)
    local = shard_batch(Case("").batch(), attach(model))
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 23, 6), torch.randn(1, 2, 23, 6)
    with pytest.raises(ValueError, match="got 5 and no window in MistralAttention"):
        hf_attention.attention_function(layer, q, k, k, None, sliding_window=5)
    marker = hf_refusals.mask_function(1, 23, 23, local_size=5)
    ids = {"position_ids": local["position_ids"]}
    told = hf_attention.attention_function(layer, q, k, k, marker, sliding_window=5, **ids)[0]
    assert torch.equal(hf_attention.attention_function(layer, q, k, k, marker, **ids)[0], told)
    assert not torch.allclose(hf_attention.attention_function(layer, q, k, k, None, **ids)[0], told, atol=1e-3)
    with pytest.raises(ValueError, match="MistralAttention is handed none"):
        hf_attention.attention_function(layer, q, k, k, marker)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda b, h, q, k: k >= 0 * q, {}),  # sees ahead
        (lambda b, h, q, k: k <= q, {"use_vmap": True}),  # a model's own overlay
        (lambda b, h, q, k: k <= q, {"local_size": 4, "config": small_config(attention_chunk_size=4)}),
    ],
)
def test_masks_refused(function: Any, options: dict[str, Any]) -> None:
    refused = hf_refusals.mask_function(1, 23, 23, mask_function=function, **options)
    assert "must be causal" in str(hf_refusals.refusal(refused))
    model = small_model("Mistral", **WINDOW)
    local = shard_batch(Case("").batch(), attach(model))
    q, k = torch.randn(1, 4, 23, 6), torch.randn(1, 2, 23, 6)
    ids = {"position_ids": local["position_ids"]}
    assert refused is not None
    for handed in (refused, torch.empty_like(refused)):  # a copy has lost the words
        with pytest.raises(ValueError, match="must be causal"):
            hf_attention.attention_function(model.model.layers[0].self_attn, q, k, k, handed, **ids)


class _Odd(transformers.LlamaForCausalLM):
    def __init__(self, config: Any, part: torch.nn.Module | None = None, stateful: bool = False) -> None:
        super().__init__(config)
        self.part, self._is_stateful = part, stateful


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.nn.Linear(2, 2), "needs a model of transformers, got Linear"),
        (lambda: _Odd(small_config(), stateful=True), "a state or a convolution"),
        (lambda: _Odd(small_config(), torch.nn.Conv1d(2, 2, 2)), "a state or a convolution"),
        (lambda: small_model(layer_types=["full_attention", "linear_attention"]), "got.*linear_attention"),
        (lambda: small_model(attention_chunk_size=8), "attention_chunk_size must be None"),
        (lambda: small_model(output_router_logits=True), "output_router_logits must be False"),
        (lambda: transformers.BertModel(transformers.BertConfig(**_bert())), "must be causal self-attention"),
        (lambda: transformers.MambaModel(transformers.MambaConfig(**_mamba())), "must have causal attention layers"),
    ],
)
def test_models_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attach(make())


def _bert() -> dict[str, Any]:
    sizes = {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 8}
    return sizes | {"num_attention_heads": 4}


def _mamba() -> dict[str, Any]:
    return {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": 24, "state_size": 4}
