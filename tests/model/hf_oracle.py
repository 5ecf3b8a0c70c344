"""What the tests against transformers share: small random models, their logits, and gradients compared by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.mixers.softmax import Attention
from longspan.model.hf_names import Stored

VOCAB = 61
NUM_TOKENS = 23


def randomise(kind: Any, config: Any) -> Any:
    """A model of a class of transformers, whose norms and biases do not stand at their first values."""
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens(rows: int = 2, seed: int = 3) -> Tensor:
    """Token ids."""
    return torch.randint(VOCAB, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(reference: Any) -> Tensor:
    """What transformers answers to `tokens()`."""
    return reference(tokens()).logits


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    # Otherwise a model that answers zeros would pass.
    assert b.std() > 1e-3
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_training(
    ours: nn.Module,
    loss: Tensor,
    reference: nn.Module,
    expected: Tensor,
    stored: list[Stored],
    rename: Any = str,
    tolerance: float = 1e-5,
) -> None:
    """Losses are equal, and so is every gradient; `rename` turns a name in files into one in the reference."""
    assert abs(loss.item() - expected.item()) <= tolerance * abs(expected.item())
    loss.backward()
    expected.backward()
    mine, want = dict(ours.named_parameters()), dict(reference.named_parameters())
    seen = set()
    # A bias of keys that are not rotated adds the same to all scores of a query and moves no softmax: its gradient is
    # zero, and what is computed for it is rounding, to be measured by the gradient of the keys' weight.
    mixers = {name: part for name, part in ours.named_modules() if isinstance(part, Attention)}
    still = {f"{name}.k.bias" for name, part in mixers.items() if part.rotary is None and part.config.softcap is None}
    for entry in stored:
        name = rename(entry.name)
        seen.add(name)
        grads = []
        for part in entry.ours:
            grad = mine[part].grad
            assert grad is not None, part
            grads.append(grad)
        grad, other = torch.cat(grads), want[name].grad
        assert other is not None, name
        grad = (grad.t() if entry.transposed else grad).reshape(other.shape)
        error, size = (grad - other).abs().max().item(), other.abs().max().item()
        if entry.ours[0] in still:
            weight = want[name.removesuffix("bias") + "weight"].grad
            assert weight is not None
            error, size = max(error, size), weight.abs().max().item()
        assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"
    assert seen == set(want)
