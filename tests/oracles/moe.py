"""A mixture of experts from its formula, one token at a time, in float64."""

from __future__ import annotations

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return down @ (silu(gate @ x) * (up @ x))


def scores_of(x: np.ndarray, router: np.ndarray, score: str) -> np.ndarray:
    """Scores of all experts for one token."""
    logits = router @ x
    if score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def mixture(
    x: np.ndarray,
    router: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    *,
    k: int,
    score: str,
    renormalise: bool,
    bias: np.ndarray | None = None,
    capacity: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(outputs, chosen experts) of rows `b l c`; of each row an expert takes its first `capacity` tokens."""
    rows, length, _ = x.shape
    out, chosen = np.zeros_like(x), np.zeros((rows, length, k), np.int64)
    for row in range(rows):
        taken = np.zeros(len(router), np.int64)
        for t in range(length):
            scores = scores_of(x[row, t], router, score)
            best = np.argsort(-(scores if bias is None else scores + bias), kind="stable")[:k]
            weights = scores[best] / (scores[best].sum() if renormalise else 1)
            chosen[row, t] = best
            for expert, weight in zip(best, weights, strict=True):
                taken[expert] += 1
                if capacity is None or taken[expert] <= capacity:
                    out[row, t] += weight * swiglu(x[row, t], gate[expert], up[expert], down[expert])
    return out, chosen


def switch_loss(scores: list[np.ndarray], chosen: list[np.ndarray], *, pooled: bool) -> float:
    """Each layer's loss added up, or the loss of all layers as one long layer; mean over tokens, coefficient 1.

    `scores`: (tokens, experts) of each layer, rows summing to 1; `chosen`: (tokens, k).
    """
    if pooled:
        scores, chosen = [np.concatenate(scores)], [np.concatenate(chosen)]
    total = 0.0
    for p, ids in zip(scores, chosen, strict=True):
        shares = np.bincount(ids.ravel(), minlength=p.shape[1]) / len(p)
        total += p.shape[1] * float((shares * p.mean(0)).sum())
    return total
