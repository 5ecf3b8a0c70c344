"""Arguments of tiny training runs whose model is given whole, by a file or a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longspan.model.config import DecoderConfig, LearnedPositionsConfig
from longspan.train.config import ModelConfig
from tests.longspan_cli import train


def given_model(out: Path, *options: str) -> list[str]:
    """As `train`, without the options of a model from scratch, for `--init` and `--model.config`."""
    argv = train(out, *options)
    named = [at for at, word in enumerate(argv) if word.startswith("--model.") and word != "--model.config"]
    return [word for at, word in enumerate(argv) if at not in named and at - 1 not in named]


def tiny_decoder(file: Path, positions: int = 0, **changes: object) -> Path:
    """The config of a tiny decoder in a file, with so many learned positions if any."""
    decoder: DecoderConfig = ModelConfig(layers=1, width=32, heads=2).decoder(257, 64)
    if positions:
        decoder = dataclasses.replace(decoder, positions=LearnedPositionsConfig(max_positions=positions))
    file.write_text(dataclasses.replace(decoder, **changes).to_json())  # type: ignore[arg-type]
    return file
