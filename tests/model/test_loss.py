"""Chunked cross-entropy against the float64 formula: values, both gradients, dtypes, memory, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.model.loss import chunked_cross_entropy
from tests.oracles.cross_entropy import cross_entropy


def problem(b, n, dim, vocab, dtype=torch.float32, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, n, dim, generator=generator).to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, dim, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (b, n), generator=generator)
    labels[torch.rand(b, n, generator=generator) < ignored] = -100
    return hidden, weight, labels


def oracle(hidden, weight, labels, softcap=None):
    flat = hidden.detach().double().flatten(0, 1).numpy()
    total, count, dhidden, dweight = cross_entropy(
        flat, weight.detach().double().numpy(), labels.flatten().tolist(), softcap
    )
    return total, count, torch.from_numpy(dhidden).view(hidden.shape), torch.from_numpy(dweight)


def plain(hidden, weight, labels, softcap=None):
    logits = F.linear(hidden, weight).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def error(got, want):
    return (got.double() - want).abs().max().item()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("b", "n", "dim", "vocab", "chunk"), [(1, 1, 3, 5, 1), (2, 7, 5, 11, 3), (1, 13, 7, 257, 1024), (3, 5, 2, 2, 15)]
)
def test_value_and_gradients_match_float64(b, n, dim, vocab, chunk, dtype, softcap):
    hidden, weight, labels = problem(b, n, dim, vocab, dtype)
    total, count, dhidden, dweight = oracle(hidden, weight, labels, softcap)
    got, num_tokens = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, softcap=softcap)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert num_tokens.dtype == torch.int64 and num_tokens.item() == count
    (got * 0.37).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    got_errors = error(got, total), error(hidden.grad, 0.37 * dhidden), error(weight.grad, 0.37 * dweight)

    again, weight_again, _ = problem(b, n, dim, vocab, dtype)
    reference = plain(again, weight_again, labels, softcap)
    (reference * 0.37).backward()
    assert again.grad is not None and weight_again.grad is not None
    plain_errors = error(reference, total), error(again.grad, 0.37 * dhidden), error(weight_again.grad, 0.37 * dweight)
    floor = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    for mine, theirs, scale in zip(
        got_errors, plain_errors, (abs(total), dhidden.abs().max(), dweight.abs().max()), strict=True
    ):
        assert mine <= 2 * theirs + 8 * floor * (1 + float(scale))


def test_plain_formula_without_the_mask_would_fail():
    hidden, weight, labels = problem(2, 7, 5, 11)
    total, *_ = oracle(hidden, weight, labels)
    assert error(chunked_cross_entropy(hidden, weight, labels.clamp(min=0))[0].detach(), total) > 0.1


def test_gradcheck():
    hidden, weight, labels = problem(2, 3, 2, 5, torch.float64)
    for softcap in (None, 2.0):
        assert torch.autograd.gradcheck(
            lambda h, w, cap=softcap: chunked_cross_entropy(h, w, labels, chunk_tokens=4, softcap=cap)[0],
            (hidden, weight),
        )


@pytest.mark.parametrize("n", [0, 5])
def test_no_label_gives_zero_loss_and_zero_gradients(n):
    hidden, weight, _ = problem(2, n, 3, 7)
    total, num_tokens = chunked_cross_entropy(hidden, weight, torch.full((2, n), -100), chunk_tokens=3)
    total.backward()
    assert total.item() == 0 and num_tokens.item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, labels = problem(1, 5, 3, 7)
    hidden = (hidden * 1e4).detach().requires_grad_()
    total, _ = chunked_cross_entropy(hidden, weight, labels)
    total.backward()
    want, _, dhidden, _ = oracle(hidden, weight, labels)
    assert hidden.grad is not None and error(hidden.grad, dhidden) < 1e-4
    assert total.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen):
    hidden, weight, labels = problem(2, 7, 5, 11)
    _, _, dhidden, dweight = oracle(hidden, weight, labels)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)[0].backward()
    live, want = (weight, dweight) if frozen == "hidden" else (hidden, dhidden)
    still = hidden if frozen == "hidden" else weight
    assert still.grad is None and live.grad is not None and error(live.grad, want) < 1e-4


def test_graph_can_be_walked_twice_but_not_differentiated_twice():
    hidden, weight, labels = problem(1, 5, 3, 7)
    total, _ = chunked_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, and how many matrix products run."""

    def __init__(self):
        super().__init__()
        self.num_elements, self.num_products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num_products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.out)
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(dtype):
    hidden, weight, labels = problem(1, 512, 8, 509, dtype)
    with Largest() as seen:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=32, softcap=5.0)[0].backward()
    assert seen.num_elements == 32 * 509
    with Largest() as naive:
        plain(hidden, weight, labels).backward()
    assert naive.num_elements == 512 * 509


def test_evaluation_runs_no_gradient_products():
    hidden, weight, labels = problem(1, 12, 3, 7)
    with torch.no_grad(), Largest() as seen:
        total, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    assert seen.num_products == 3 and not total.requires_grad
    with Largest() as seen:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)[0].backward()
    assert seen.num_products == 9


def test_autocast_does_not_lower_the_logits():
    hidden, weight, labels = problem(1, 13, 7, 31)
    want, _ = chunked_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = chunked_cross_entropy(hidden, weight, labels)
    assert torch.equal(got, want)


def test_mixed_dtypes_are_raised_to_the_wider():
    hidden, weight, labels = problem(1, 7, 5, 11)
    narrow = hidden.detach().bfloat16().requires_grad_()
    total, *_, dweight = oracle(narrow, weight, labels)
    got, _ = chunked_cross_entropy(narrow, weight, labels)
    got.backward()
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
    assert weight.grad is not None and error(weight.grad, dweight) < 1e-5
    assert got.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((1, 5), 7)}, r"0\.\.6.*got 7"),
        ({"labels": torch.full((1, 5), -1)}, "got -1"),
        ({"labels": torch.zeros(1, 4, dtype=torch.int64)}, "shape"),
        ({"labels": torch.zeros(1, 5, dtype=torch.int32)}, "int64"),
        ({"weight": torch.zeros(7, 4)}, "one dim"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    hidden, weight, labels = problem(1, 5, 3, 7)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, **change}
    with pytest.raises(ValueError, match=message) as caught:
        chunked_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_bias_is_one_more_column_of_the_head(softcap):
    hidden, weight, labels = problem(2, 7, 5, 11, torch.float64)
    bias = torch.linspace(-2, 2, 11, dtype=torch.float64, requires_grad=True)
    total, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=3, softcap=softcap, bias=bias)
    got = torch.autograd.grad(0.37 * total, (hidden, weight, bias))
    wide = torch.cat((hidden, torch.ones(2, 7, 1, dtype=torch.float64)), -1)
    want_total, _, dhidden, dweight = oracle(wide, torch.cat((weight, bias[:, None]), 1), labels, softcap)
    assert error(total, want_total) < 1e-12
    for grad, want in zip(got, (dhidden[..., :-1], dweight[:, :-1], dweight[:, -1]), strict=True):
        assert error(grad, 0.37 * want) < 1e-12
    frozen, _ = chunked_cross_entropy(hidden.detach(), weight.detach(), labels, softcap=softcap, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(0.37 * frozen, bias)[0], got[2])
    with pytest.raises(ValueError, match=r"each of the 11 rows of weight, got \(10,\)"):
        chunked_cross_entropy(hidden, weight, labels, bias=bias[:10])
