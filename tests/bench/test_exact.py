"""The yardstick of benchmarks: the formula by rows is the formula, and a wrong result is beyond the limit."""

from __future__ import annotations

import pytest
import torch

from longspan.attention.patterns import PATTERNS
from longspan.bench.attention_cell import Problem
from longspan.bench.exact import excess, formula, formula_by_rows, formula_of_rows, make_inputs


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("rows", [7, 512])
def test_the_answer_by_rows_is_the_formula(name, rows, monkeypatch) -> None:
    monkeypatch.setattr("longspan.bench.exact._ROWS", rows)
    problem = Problem(mask=name, length=53, heads=4, kv_heads=2, head_dim=5, dtype="fp64")
    mask = problem.make_mask()
    inputs = make_inputs(53, h=4, g=2, d=5, dtype=torch.float64)
    for by_rows, whole in zip(formula_by_rows(inputs, mask), formula(inputs, mask.dense()), strict=True):
        torch.testing.assert_close(by_rows, whole, rtol=0, atol=1e-13)


def test_any_rows_are_those_rows() -> None:
    mask = Problem(mask="causal_document", length=53, heads=4, kv_heads=2, head_dim=5, dtype="fp64").make_mask()
    inputs = make_inputs(53, h=4, g=2, d=5, dtype=torch.float64)
    whole, rows = formula(inputs, mask.dense()), [0, 1, 17, 40, 52]
    for some, every in zip(formula_of_rows(inputs, mask, rows), (whole.out, whole.dq), strict=True):
        torch.testing.assert_close(some, every[:, rows], rtol=0, atol=1e-13)


def test_a_result_is_judged_by_its_dtype() -> None:
    exact = [torch.linspace(-1, 1, 64, dtype=torch.float64)]
    rounded = [x.bfloat16() for x in exact]
    assert excess(rounded, exact, rounded) <= 1
    assert excess([x + 0.02 for x in exact], exact, rounded) > 1
    assert excess([x * float("nan") for x in exact], exact, rounded) == float("inf")
