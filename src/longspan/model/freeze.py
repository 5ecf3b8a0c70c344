"""Frozen parameters: chosen by patterns over their names, they get no gradient and no optimiser state.

A pattern is the beginning of a name, part by part between dots: `embed`, `blocks.0-3` (a range, both ends included),
`blocks.*.mlp` (wildcards as in a shell). Several may stand in one string, separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

_RANGE = re.compile(r"(\d+)-(\d+)")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the beginning of a parameter's name."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(_part_matches, wanted, parts))


def _part_matches(wanted: str, part: str) -> bool:
    if span := _RANGE.fullmatch(wanted):
        return part.isdecimal() and int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)


def freeze(model: nn.Module, patterns: Iterable[str], names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Freezes the parameters that a pattern matches, in place, and returns their names. Before sharding.

    Args:
        names: where the model is a part of a whole one, of all parameters of that: patterns are of it.

    Raises:
        ValueError: a pattern that matches nothing, or patterns that leave nothing to train.
    """
    own = dict(model.named_parameters())
    names = list(own) if names is None else list(names)
    frozen: set[str] = set()
    for pattern in (part.strip() for text in patterns for part in text.split(",")):
        found = {name for name in names if matches(pattern, name)}
        if not found:
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(f"a freeze pattern must match a parameter, got {pattern!r}; names begin with {tops}")
        frozen |= found
    if frozen and len(frozen) == len(names):
        raise ValueError(f"some parameter must be left to train, got all {len(names)} frozen; freeze fewer")
    here = tuple(name for name in own if name in frozen)
    for name in here:
        own[name].requires_grad_(False)
    return here
