"""What ranks of a run choose: a function of the mask alone, the same on every rank, said once, and kept by a resume."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from longspan.attention import masks
from longspan.context.choose import Where, choose_layout
from longspan.context.schedule import Sizes
from longspan.hardware.profile import make_profile
from longspan.hardware.topology import lab, make_topology
from longspan.train.prepare import Prepare
from tests.longspan_cli import forked, losses, records, train

DOCUMENTS = ([1000, 24], [37] * 40, [300, 700, 24], [1024], [500, 524], [900, 60, 64])


def preparing(rank: int = 0, *, wires: str = "port", layout: str | None = None, window: int | None = None) -> Prepare:
    topology = lab("port", 4, 1e8) if wires == "port" else make_topology(wires, 4)
    where = Where(topology=topology, device=make_profile("cpu"), sizes=Sizes(head_dim=32, inputs=4, sums=4))
    kinds = ((8, 2, None), (8, 2, window)) if window else ((8, 2, None),)
    return Prepare(kinds=kinds, world=4, rank=rank, method="auto", layout=layout, where=where)


def test_a_choice_does_not_depend_on_those_before_it_nor_on_the_process() -> None:
    there = [masks.documents(lengths) for lengths in DOCUMENTS]
    prepare = preparing()
    found = {mask.fingerprint: prepare.of(mask) for mask in there}
    again = pickle.loads(pickle.dumps(preparing(rank=3)))
    for mask in reversed(there):
        other, mine = again.of(mask), found[mask.fingerprint]
        assert other.layout == mine.layout and other.names == mine.names and other.why == mine.why
        assert [b.fingerprint for b in other.built.values()] == [b.fingerprint for b in mine.built.values()]
        assert pickle.loads(pickle.dumps(mine)) == mine
    assert len({prepared.layout.name for prepared in found.values()}) > 1, "the layout follows the mask"


def test_it_is_the_choice_by_estimate_and_a_given_layout_stays() -> None:
    mask, prepare = masks.documents(DOCUMENTS[0]), preparing()
    assert prepare.where is not None
    layout, choice = choose_layout(mask, 4, 8, 2, prepare.where)
    assert prepare.of(mask).names == (layout.name, choice.chosen.method)
    assert preparing(layout="striped").of(mask).names[0] == "striped"
    assert f"method {choice.chosen.method}, layout {layout.name}" in prepare.of(mask).why
    assert "longspan plan --explain" in prepare.of(mask).why


def test_layers_with_a_window_share_the_layout() -> None:
    prepared = preparing(window=100).of(masks.documents(DOCUMENTS[3]))
    whole, cut = prepared.built.values()
    assert whole.layout == cut.layout == prepared.layout and whole.mask != cut.mask


# ---------------------------------------------------------------- in a run


def packed(tmp_path: Path) -> list[str]:
    """Options of a run whose mask is another one in every step."""
    data = tmp_path / "short.jsonl"
    texts = [f"the ring turns {number} times" * (1 + number % 4) for number in range(40)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [
        "--data.paths", str(data), "--batch.packing", "documents", "--batch.tokens", "192", "--data-workers", "0",
        "--save-every", "3",
    ]  # fmt: skip


def test_a_run_says_its_choices_once_and_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole, resumed, options = tmp_path / "whole", tmp_path / "resumed", packed(tmp_path)
    said = forked(*train(whole, *options), world=2).good()
    notes = [record["message"] for record in records(whole, "event") if "attention over" in record["message"]]
    assert notes and len(set(notes)) == len(notes) and all("2 ranks: method " in note for note in notes)
    assert [said.out.count(note) for note in notes] == [1] * len(notes)
    assert all(record["data_wait_s"] >= 0 for record in records(whole))

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000006")
    shutil.rmtree(resumed / "model")
    forked(*train(resumed, *options, "--resume", "latest"), world=2).good()
    assert losses(resumed) == losses(whole)
    model = Path("model") / "model.safetensors"
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.parametrize("options", [("--plan.layout", "zigzga"), ("--plan.method", "usp:x")])
def test_names_are_refused_before_ranks_start(tmp_path: Path, options: tuple[str, str]) -> None:
    assert options[1].partition(":")[2] in forked(*train(tmp_path / "run", "--ranks", "2", *options)).refusal()
