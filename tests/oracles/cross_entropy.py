"""Summed cross-entropy and its gradients from the formula in float64, row by row."""

from __future__ import annotations

import numpy as np


def cross_entropy(hidden, weight, labels, softcap=None):
    """hidden (n, dim), weight (vocab, dim), labels (n,), -100 = none -> (sum, count, dhidden, dweight), float64."""
    hidden, weight = np.asarray(hidden, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    dhidden, dweight = np.zeros_like(hidden), np.zeros_like(weight)
    total, count = 0.0, 0
    for row, label in enumerate(labels):
        if label == -100:
            continue
        raw = weight @ hidden[row]
        logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
        top = logits.max()
        log_partition = top + np.log(np.exp(logits - top).sum())
        total += log_partition - logits[label]
        count += 1
        grad = np.exp(logits - log_partition)
        grad[label] -= 1.0
        if softcap is not None:
            grad *= 1.0 - np.tanh(raw / softcap) ** 2
        dhidden[row] = weight.T @ grad
        dweight += np.outer(grad, hidden[row])
    return total, count, dhidden, dweight
