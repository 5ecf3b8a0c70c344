"""Cached generation: every step equals the uncached model, greedy text is transformers', sampling keeps its support."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, NormConfig
from longspan.model.decoder import build
from longspan.model.generate import CachedContext, generate, sample
from longspan.model.huggingface import load_pretrained
from tests.model.test_decoder import GEMMA, ids
from tests.oracles.attention_plain import causal_attention

STEPS = [(13,), (1,) * 13, (7, 1, 1, 4), (1, 12)]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize(("h", "g"), [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize(
    ("window", "scale", "softcap"),
    [(None, None, None), (3, 0.2, None), (1, None, None), (None, 0.9, 2.0), (5, None, 1.5)],
)
def test_cached_attention_equals_the_formula(steps, h, g, window, scale, softcap):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 13, heads, 4, generator=generator) for heads in (h, g, g))
    ctx = CachedContext(capacity=2)
    pieces, start = [], 0
    for num_tokens in steps:
        ctx.extend(num_tokens)
        rows = slice(start, start + num_tokens)
        assert ctx.positions.tolist() == list(range(start, start + num_tokens))
        for layer in (0, 7):
            out = ctx.attend(
                q[:, rows],
                k[:, rows],
                v[:, rows] * (layer + 1),
                layer=layer,
                window=window,
                scale=scale,
                softcap=softcap,
            )
        assert out.shape == q[:, rows].shape
        pieces.append(out / 8)
        start += num_tokens
    want = torch.from_numpy(causal_attention(q, k, v, window=window, scale=scale, softcap=softcap))
    torch.testing.assert_close(torch.cat(pieces, 1).double(), want, rtol=0, atol=2e-6)
    if window is None:
        wrong = torch.from_numpy(causal_attention(q, k, v, window=2, scale=scale, softcap=softcap))
        assert (wrong - want).abs().max() > 1e-2


def test_steps_of_windows_rotations_and_softcaps_equal_the_uncached_model():
    config = replace(GEMMA, attention=replace(GEMMA.attention, softcap=2.0, scale=0.3))
    model, prompt = build(config, device="cpu"), ids(9)
    want = prompt
    for _ in range(6):
        want = torch.cat((want, model(want)[:, -1].argmax(-1, keepdim=True)), 1)
    got = torch.tensor(list(generate(model, prompt, max_new_tokens=6, temperature=0))).T
    assert torch.equal(got, want[:, 9:])
    ctx = CachedContext(capacity=4)
    with torch.no_grad():
        steps = []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            ctx.extend(stop - start)
            steps.append(model(prompt[:, start:stop], ctx))
    torch.testing.assert_close(torch.cat(steps, 1), model(prompt), rtol=1e-5, atol=1e-5)


def test_bf16_cache_keeps_the_dtype_and_counts_its_bytes():
    ctx = CachedContext(capacity=4)
    q = torch.randn(1, 5, 4, 8).bfloat16()
    ctx.extend(5)
    out = ctx.attend(q, q[:, :, :2], q[:, :, :2], layer=0)
    assert out.dtype == torch.bfloat16
    assert ctx.memory_bytes == 2 * 8 * 2 * 8 * 2


def test_a_context_out_of_step_is_refused():
    x = torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        CachedContext(capacity=0)
    ctx = CachedContext()
    with pytest.raises(ValueError, match="call extend"):
        ctx.attend(x, x, x, layer=0)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        ctx.extend(0)
    ctx.extend(2)
    with pytest.raises(ValueError, match="has not run"):
        ctx.extend(1)
    ctx.attend(x, x, x, layer=0)
    with pytest.raises(ValueError, match="layer 0 has 2 cached tokens, needs 0"):
        ctx.attend(x, x, x, layer=0)
    ctx.attend(x, x, x, layer=1)
    ctx.extend(2)
    ctx.attend(x, x, x, layer=1)
    with pytest.raises(ValueError, match="has not run"):
        ctx.extend(1)
    with pytest.raises(ValueError, match="no gradients"):
        ctx.attend(x, x.clone().requires_grad_(), x, layer=0)


LOGITS = torch.tensor([[1.0, 3.0, -torch.inf, 2.0, 0.0, 3.0]])


def frequencies(num_draws=20_000, **options):
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(num_draws, -1).clone(), generator=generator, **options)
    return torch.bincount(drawn, minlength=LOGITS.shape[1]) / num_draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "support"),
    [
        (None, None, [0, 1, 3, 4, 5]),
        (1, None, [1]),
        (3, None, [1, 3, 5]),
        (99, 1.0, [0, 1, 3, 4, 5]),
        (None, 1e-9, [1]),
    ],
)
def test_sampling_follows_the_truncated_softmax(temperature, top_k, top_p, support):
    got = frequencies(temperature=temperature, top_k=top_k, top_p=top_p)
    want = torch.zeros(LOGITS.shape[1])
    want[support] = (LOGITS[0, support] / temperature).softmax(0)
    assert (got > 0).nonzero()[:, 0].tolist() == support
    # Four standard deviations of a share over 20,000 draws.
    assert ((got - want).abs() <= 4 * (want * (1 - want) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    ("top_p", "top_k", "support"),
    [(0.45, None, [1, 5]), (0.7, None, [1, 5]), (0.85, None, [1, 3, 5]), (0.6, 3, [1, 5]), (0.4, 1, [1])],
)
def test_top_p_takes_the_fewest_tokens_that_reach_p(top_p, top_k, support):
    # At temperature 1: 1 and 5 have 0.391 each, 3 has 0.144, 0 has 0.053, 4 has 0.019.
    assert (frequencies(top_p=top_p, top_k=top_k) > 0).nonzero()[:, 0].tolist() == support


def test_top_p_is_taken_after_top_k():
    # Among the first three the shares are 0.422, 0.422, 0.155: 0.8 needs two tokens, of all tokens it would need three.
    assert (frequencies(top_k=3, top_p=0.8) > 0).nonzero()[:, 0].tolist() == [1, 5]
    assert (frequencies(top_p=0.8) > 0).nonzero()[:, 0].tolist() == [1, 3, 5]


def test_zero_temperature_takes_the_lowest_of_the_best():
    assert sample(LOGITS, temperature=0).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_wrong_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(LOGITS, **options)
    assert "\n" not in str(caught.value)


LLAMA = DecoderConfig(
    num_layers=2,
    hidden_size=24,
    vocab_size=53,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=MlpConfig(inner_size=40),
    init_std=0.3,
)
GPT2 = replace(
    LLAMA,
    attention=AttentionConfig(num_heads=3, head_dim=8, qkv_bias=True, out_bias=True),
    norm=NormConfig(kind="layer"),
    mlp=MlpConfig(kind="gelu_tanh", inner_size=48, bias=True),
    positions=LearnedPositionsConfig(max_positions=29),
    tie_embeddings=True,
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "window": replace(LLAMA, windows=(5, None)),
    "qk-norm, softcap, parallel": replace(
        LLAMA,
        attention=AttentionConfig(num_heads=5, num_kv_heads=1, head_dim=6, qk_norm_eps=1e-6, softcap=3.0, scale=0.5),
        wiring="parallel",
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def ids_of(config, b, n, seed=0):
    return torch.randint(config.vocab_size, (b, n), generator=torch.Generator().manual_seed(seed))


@each_config
@pytest.mark.parametrize("steps", [(1,) * 23, (11, 1, 1, 7, 3)], ids=["one by one", "pieces"])
@torch.no_grad()
def test_steps_folded_over_time_equal_the_forward(config, steps):
    model = build(config, device="cpu", seed=3)
    ids = ids_of(config, 2, 23)
    want = model(ids)
    ctx = CachedContext(capacity=3)
    pieces = []
    for piece in ids.split(steps, dim=1):
        ctx.extend(piece.shape[1])
        pieces.append(model(piece, ctx))
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert ctx.num_tokens == 23


@each_config
@torch.no_grad()
def test_greedy_equals_the_argmax_of_uncached_forwards(config, monkeypatch):
    monkeypatch.setattr("longspan.model.generate._PROMPT_PIECE", 4)
    model = build(config, device="cpu", seed=3)
    ids = ids_of(config, 2, 9)
    got = list(generate(model, ids, max_new_tokens=12, temperature=0))
    for step in got:
        logits = model(ids)[:, -1]
        assert step == logits.argmax(-1).tolist()
        ids = torch.cat([ids, torch.tensor(step)[:, None]], 1)
    assert len(got) == 12


def save_tiny(architecture, folder):
    import transformers

    shared = {
        "vocab_size": 61,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.3,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_positions=40, n_embd=32, n_layer=2, n_head=4, **shared)
    elif architecture == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **sizes, **shared)
    else:
        config = transformers.MistralConfig(num_key_value_heads=2, sliding_window=6, **sizes, **shared)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_greedy_text_is_transformers(architecture, tmp_path):
    theirs = save_tiny(architecture, tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    prompt = torch.randint(61, (1, 11), generator=torch.Generator().manual_seed(0))
    want = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, use_cache=True
    )[0, 11:].tolist()
    assert [token for (token,) in generate(ours, prompt, max_new_tokens=24, temperature=0)] == want
    assert len(set(want)) > 3


def test_a_seed_repeats_its_text_and_another_does_not():
    model = build(LLAMA, device="cpu")
    texts = [list(generate(model, ids_of(LLAMA, 2, 5), max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_row_ends_with_a_stop_id_and_the_others_go_on():
    model = build(LLAMA, device="cpu", seed=3)
    ids = ids_of(LLAMA, 2, 5)
    free = list(generate(model, ids, max_new_tokens=15, seed=4))
    first, second = ([step[row] for step in free] for row in (0, 1))
    stop = first[3]
    ends = [text.index(stop) if stop in text else 15 for text in (first, second)]
    assert ends[0] != ends[1]
    got = list(generate(model, ids, max_new_tokens=15, seed=4, stop_ids=[stop]))
    for row, text in enumerate((first, second)):
        assert [step[row] for step in got] == (text[: ends[row] + 1] + [-1] * 15)[: len(got)]
    assert len(got) == min(15, max(ends) + 1)


def test_tokens_are_streamed_and_gradients_stay_on_outside():
    model = build(LLAMA, device="cpu")
    runs = []
    assert model.norm is not None
    model.norm.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    stream = generate(model, ids_of(LLAMA, 1, 5), max_new_tokens=100)
    assert runs == []
    next(stream)
    assert runs == [False] and torch.is_grad_enabled()
    next(stream)
    assert len(runs) == 2


def test_logits_that_are_not_numbers_are_refused():
    model = build(LLAMA, device="cpu")
    with torch.no_grad():
        dict(model.named_parameters())["norm.weight"].fill_(torch.nan)
    with pytest.raises(ValueError, match="after token 5 are NaN"):
        next(generate(model, ids_of(LLAMA, 1, 5), max_new_tokens=2, temperature=0))


def test_learned_positions_may_be_filled_but_not_passed():
    model = build(GPT2, device="cpu")
    assert len(list(generate(model, ids_of(GPT2, 1, 20), max_new_tokens=10))) == 10
    with pytest.raises(ValueError, match="learned 29 positions, got 20 prompt and 11 new tokens"):
        generate(model, ids_of(GPT2, 1, 20), max_new_tokens=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token, got none"),
        ({"prompt_ids": torch.zeros(3, dtype=torch.int64)}, "batch of one"),
        ({"prompt_ids": torch.zeros(1, 3)}, "int64"),
        ({"prompt_ids": torch.tensor([[1, 53]])}, r"0\.\.52, got 53"),
        ({"prompt_ids": torch.tensor([[1, -2]])}, "got -2"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_wrong_options_are_refused_at_the_call(change, message):
    model = build(LLAMA, device="cpu")
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **{"prompt_ids": ids_of(LLAMA, 1, 5), "max_new_tokens": 3, **change})
    assert "\n" not in str(caught.value)
