"""ring-flash-attention's functions against dense attention: its token orders, forms, windows, lse and refusals."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longspan import compat
from tests.oracles.attention import dense_attention
from tests.ranks import RankError, run_ranks

H, G, D, SCALE = 4, 2, 3, 0.7
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
    "group": None,
}
BATCHED = ("ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn")
VARLEN = ("ring_flash_attn_varlen", "zigzag_ring_flash_attn_varlen")
LLAMA3 = "llama3_flash_attn_varlen"


class Case(NamedTuple):
    name: str
    form: str = "func"
    local: tuple[int, ...] = (4,)  # tokens of each document on a rank (llama3: of each document, of all ranks)
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    kv_heads: int = G

    @property
    def varlen(self) -> bool:
        return "varlen" in self.name

    def lengths(self, world: int) -> list[int]:
        return list(self.local) if self.name == LLAMA3 else [n * world for n in self.local]

    def tokens(self, rank: int, world: int) -> np.ndarray:
        """Global positions of a rank's tokens, in the order of ring-flash-attention's own tests."""
        lengths = self.lengths(world)
        if self.name == LLAMA3:
            return np.arange(sum(lengths)).reshape(world, -1)[rank]
        if self.name.startswith("stripe"):
            return np.arange(rank, sum(lengths), world)
        parts = []
        for start, stop in pairwise(np.cumsum([0, *lengths])):
            document = np.arange(start, stop)
            if self.name.startswith("zigzag"):
                halves = document.reshape(2 * world, -1)
                parts += [halves[rank], halves[2 * world - 1 - rank]]
            else:
                parts.append(document.reshape(world, -1)[rank])
        return np.concatenate(parts)

    def allowed(self, world: int) -> np.ndarray:
        lengths = self.lengths(world)
        document = np.repeat(np.arange(len(lengths)), lengths)
        at = np.arange(sum(lengths))
        ahead = at[None, :] - at[:, None]
        left, right = self.window
        allowed = document[:, None] == document[None, :]
        if left >= 0:
            allowed &= ahead >= -left
        if right >= 0:
            allowed &= ahead <= right
        return allowed & (ahead <= 0) if self.causal else allowed

    def inputs(self, world: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        shapes = [(1 if self.varlen else 2, sum(self.lengths(world)), heads, D) for heads in self.heads]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    @property
    def heads(self) -> tuple[int, int, int, int]:
        return H, self.kv_heads, self.kv_heads, H


def results(rank: int, world: int, cases: list[Case]) -> list[list[np.ndarray]]:
    """This rank's tokens, out, lse, dq, dk, dv of every case."""
    return [_result(case, rank, world) for case in cases]


def _result(case: Case, rank: int, world: int) -> list[np.ndarray]:
    tokens = case.tokens(rank, world)
    q, k, v, dout = (x[0, tokens] if case.varlen else x[:, tokens] for x in case.inputs(world))
    q, k, v = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    stack = {
        "func": lambda: (q, k, v),
        "kvpacked_func": lambda: (q, torch.stack([k, v], dim=-3)),
        "qkvpacked_func": lambda: (torch.stack([q, k, v], dim=-3),),
    }
    out, lse, none = getattr(compat, f"{case.name}_{case.form}")(
        *stack[case.form](),
        *_documents(case, rank, world),
        softmax_scale=SCALE,
        causal=case.causal,
        window_size=case.window,
        deterministic=True,
        return_attn_probs=True,
        group=dist.group.WORLD,
    )
    assert none is None and out.shape == q.shape
    out.backward(dout)
    found = [out.detach(), lse.detach().unsqueeze(0) if case.varlen else lse.detach()]
    found += [x.grad for x in leaves if x.grad is not None]
    assert len(found) == 5
    return [tokens, *(x.numpy() for x in found)]


def _documents(case: Case, rank: int, world: int) -> tuple[Any, ...]:
    if not case.varlen:
        return ()
    edges = torch.tensor(np.cumsum([0, *case.local]), dtype=torch.int32)
    if case.name != LLAMA3:
        return edges, max(case.local)
    *cumulative, longest_q, longest_k, keys = compat.llama3_flash_attn_prepare_cu_seqlens(
        edges, case.causal, rank, world
    )
    return *cumulative, longest_q, longest_k, 1, keys


def error(case: Case, ranks: list[list[np.ndarray]]) -> float:
    """Largest difference from dense attention, in out, lse and all gradients."""
    world = len(ranks)
    q, k, v, dout = case.inputs(world)
    expected = dense_attention(q, k, v, dout, case.allowed(world), scale=SCALE)
    worst = 0.0
    for tokens, out, lse, *grads in ranks:
        pairs = [(lse, expected.lse[:, :, tokens])]
        for mine, whole in zip((out, *grads), (expected.out, expected.dq, expected.dk, expected.dv), strict=True):
            pairs.append((mine.reshape(-1, len(tokens), *mine.shape[-2:]), whole[:, tokens]))
        worst = max(worst, *(float(np.abs(mine - reference).max()) for mine, reference in pairs))
    return worst


CASES = [
    *(Case(name, causal=causal) for name in BATCHED for causal in (True, False)),
    *(Case(name, window=(3, -1)) for name in BATCHED),
    Case("ring_flash_attn", causal=False, window=(5, 2)),
    Case("stripe_flash_attn", local=(5,)),
    Case("zigzag_ring_flash_attn", "kvpacked_func"),
    Case("ring_flash_attn", "qkvpacked_func", kv_heads=H),
    *(Case(name, local=(2, 6, 4), causal=causal) for name in VARLEN for causal in (True, False)),
    *(Case(name, local=(4, 0, 2), window=(4, 0)) for name in VARLEN),
    Case(VARLEN[0], "kvpacked_func", local=(1, 3)),
    Case(VARLEN[1], "qkvpacked_func", local=(2, 4), kv_heads=H),
    Case(LLAMA3, local=(5, 12, 1, 6)),
    Case(LLAMA3, local=(5, 12, 1, 6), causal=False),
    Case(LLAMA3, "kvpacked_func", local=(24,), window=(7, -1)),
    Case(LLAMA3, "qkvpacked_func", local=(8, 8, 8), kv_heads=H),
]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_function_equals_dense_attention(world: int) -> None:
    found = run_ranks(results, world, CASES)
    errors = {case: error(case, [mine[i] for mine in found]) for i, case in enumerate(CASES)}
    assert not {case: worst for case, worst in errors.items() if not worst < 1e-11}


def test_a_wrong_mask_or_order_of_tokens_is_seen() -> None:
    case = Case("zigzag_ring_flash_attn")
    found = [mine[0] for mine in run_ranks(results, 2, [case])]
    assert error(case, found) < 1e-11
    assert error(case._replace(causal=False), found) > 0.01
    swapped = [[found[1][0], *found[0][1:]], [found[0][0], *found[1][1:]]]
    assert error(case, swapped) > 0.01


def test_two_runs_are_equal_bit_by_bit() -> None:
    cases = [Case(name) for name in BATCHED]
    for first, second in zip(run_ranks(results, 3, cases), run_ranks(results, 3, cases), strict=True):
        for mine, again in zip(first, second, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, again, strict=True))


@pytest.mark.parametrize("name", [*BATCHED, *VARLEN, LLAMA3])
def test_signatures_are_those_of_ring_flash_attention(name: str) -> None:
    documents: list[str] = []
    if name in VARLEN:
        documents = ["cu_seqlens", "max_seqlen"]
    elif name == LLAMA3:
        documents = [f"{what}_{of}" for what in ("cu_seqlens", "max_seqlen") for of in "qk"]
        documents += ["heads_k_stride", "local_k_slice"]
    for form, tensors in (("func", ["q", "k", "v"]), ("kvpacked_func", ["q", "kv"]), ("qkvpacked_func", ["qkv"])):
        function = getattr(compat, f"{name}_{form}")
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [*tensors, *documents, *OPTIONS]
        assert {key: parameters[key].default for key in OPTIONS} == OPTIONS
        assert function.__name__ == f"{name}_{form}" and function.__name__ in compat.__all__ and function.__doc__
        # By keyword, as well as by position.
        with pytest.raises(ValueError, match="dropout_p"):
            heads = {"kv": (2, H, D), "qkv": (3, H, D)}
            given = {t: torch.zeros(1, 2, *heads.get(t, (H, D))) for t in tensors} | dict.fromkeys(documents)
            function(**given | {"heads_k_stride": 1} if name == LLAMA3 else given, dropout_p=0.1)


def test_plain_call_returns_only_the_output() -> None:
    q = torch.randn(2, 5, 2, 4)
    x = q.transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    assert torch.allclose(compat.ring_flash_attn_func(q, q, q), expected, atol=1e-6)


@pytest.mark.parametrize(("causal", "expected"), [(True, (4, 8)), (False, (4, 11))])
def test_prepared_lengths(causal: bool, expected: tuple[int, int]) -> None:
    """Rank 1 of 3 on documents of 1, 10 and 1: its tokens 4..8 lie in the middle of the second."""
    q, k, longest_q, longest_k, keys = compat.llama3_flash_attn_prepare_cu_seqlens(
        torch.tensor([0, 1, 11, 12], dtype=torch.int32), causal, 1, 3
    )
    longest, stop = expected[0], expected[1]
    assert (q.tolist(), k.tolist(), longest_q, longest_k) == ([0, longest], [0, stop - 1], longest, stop - 1)
    assert keys == slice(1, stop) and q.dtype == k.dtype == torch.int32


ZEROS = torch.zeros(1, 3, 2, 4)
FLAT = torch.zeros(3, 2, 4)


@pytest.mark.parametrize(
    ("name", "tensors", "options", "says"),
    [
        ("ring_flash_attn_func", (ZEROS,) * 3, {"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
        ("ring_flash_attn_func", (ZEROS,) * 3, {"alibi_slopes": torch.ones(2)}, "alibi_slopes must be None"),
        ("ring_flash_attn_func", (ZEROS,) * 3, {"window_size": (-2, 0)}, r"window_size .* got \(-2, 0\)"),
        ("ring_flash_attn_func", (FLAT,) * 3, {}, "functions with varlen"),
        ("ring_flash_attn_func", (ZEROS[:, :0],) * 3, {}, "empty shard"),
        ("ring_flash_attn_kvpacked_func", (ZEROS, ZEROS), {}, r"kv must be \(\.\.\., 2, heads"),
        ("zigzag_ring_flash_attn_func", (ZEROS,) * 3, {}, "must be even, got 3"),
        ("ring_flash_attn_varlen_func", (ZEROS,) * 3, {"cu": [0, 3]}, "functions without varlen"),
        ("ring_flash_attn_varlen_func", (FLAT,) * 3, {"cu": [0, 2]}, "cu_seqlens must rise from 0 to the 3 tokens"),
        ("ring_flash_attn_varlen_func", (FLAT,) * 3, {"cu": [0, 2, 1, 3]}, "must rise"),
        ("ring_flash_attn_varlen_func", (FLAT,) * 3, {"cu": [0, 3], "max_seqlen": 2}, "max_seqlen must be at least"),
        ("zigzag_ring_flash_attn_varlen_func", (FLAT,) * 3, {"cu": [0, 2, 3]}, "document is two equal parts.*got 1"),
    ],
)
def test_refusals(name: str, tensors: tuple, options: dict[str, Any], says: str) -> None:
    if "varlen" in name:
        cu_seqlens = torch.tensor(options.pop("cu"), dtype=torch.int32)
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": 3} | options
    with pytest.raises(ValueError, match=says):
        getattr(compat, name)(*tensors, **options)


def test_ranks_must_divide_the_tokens_of_llama3() -> None:
    with pytest.raises(ValueError, match="13 tokens on 2 ranks; pad"):
        compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 13]), True, 0, 2)


def one_rank_is_wrong(rank: int, world: int, how: str) -> str:
    """The refusal on every rank of a call that is wrong on the first one."""
    odd = rank == 0
    q = torch.zeros(6 if odd and how == "tokens" else 4, 2, 4)
    try:
        if how == "tokens":
            compat.zigzag_ring_flash_attn_func(q[None], q[None], q[None])
        else:
            edges = torch.tensor([0, 3, 8], dtype=torch.int32)
            causal = not (odd and how == "causal")
            given = compat.llama3_flash_attn_prepare_cu_seqlens(edges, causal, rank, world)
            stride = 3 if odd and how == "stride" else 1
            compat.llama3_flash_attn_varlen_func(q, q, q, *given[:4], stride, given[4], causal=True)
    except ValueError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("tokens", "all ranks must use one mask"),
        ("stride", "heads_k_stride must divide the 2"),
        ("causal", "prepare the lengths with the same causal"),
    ],
)
def test_what_is_wrong_on_one_rank_is_refused_on_all(how: str, says: str) -> None:
    assert all(says in message for message in run_ranks(one_rank_is_wrong, 2, how))


def test_a_rank_that_raises_is_named() -> None:
    with pytest.raises(RankError):
        run_ranks(results, 2, [Case("zigzag_ring_flash_attn", local=(3,))])
