"""`longspan plan`: the choice is that of "auto", what is told of it comes from the simulator, bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.attention.patterns import PATTERNS
from longspan.cli import main
from longspan.context.choose import choose_layout
from longspan.context.methods import METHODS
from longspan.plan.command import PlanConfig, in_text
from longspan.plan.explain import ALL_RANKS, BEST, explain

SMALL = ["--length", "1000", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32", "--ranks", "3"]


def config(**changes: object) -> PlanConfig:
    given = {"length": 4096, "ranks": 4, "heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32"}
    return PlanConfig(**(given | {"topology": "port", "rate": "100mbit"} | changes))  # type: ignore[arg-type]


def test_it_is_the_choice_of_auto_and_every_method_is_accounted_for() -> None:
    given = config(mask="causal_document")
    mask, where = given.make_mask(), given.where()
    layout, choice = choose_layout(mask, 4, 8, 8, where)
    found = explain(mask, 8, 8, where)
    assert (found.layout, found.chosen) == (layout, choice.chosen)
    assert found.layouts[0].name == layout.name and found.methods[0].method == choice.chosen.method
    assert found.layouts == tuple(sorted(found.layouts, key=lambda row: row.estimated_s))
    told = {row.method for row in found.methods} | found.refused.keys()
    assert told >= METHODS.keys() and not {row.method for row in found.methods} & found.refused.keys()
    assert all(row.peak_bytes and row.simulated_s and row.max_sent_bytes for row in found.methods)
    assert all((row.max_sent_bytes or 0) >= (row.mean_sent_bytes or 0) > 0 for row in found.methods)


def test_reasons_follow_the_wires() -> None:
    slow, fast = config(), config(topology="h100", rate="none", dtype="bf16", length=65536)
    for given, words in ((slow, "Bound by the wires"), (fast, "Bound by computation")):
        found = explain(given.make_mask(), given.heads, given.kv_heads, given.where())
        assert found.reasons[0].startswith(words), found.reasons
        assert given.where().topology.name in found.reasons[0] and "of a whole ring's bytes" in found.reasons[1]


def test_stages_that_promise_too_little_are_said_to() -> None:
    given = config(topology="mesh", rate="600mbit", length=2048)
    found = explain(given.make_mask(), 8, 8, given.where())
    assert found.chosen.method == "ulysses"
    assert any(reason.endswith("and stages must promise 5%.") for reason in found.reasons), found.reasons


def test_a_method_that_cannot_compute_the_mask_is_listed_with_its_reason() -> None:
    given = config(mask="full")
    found = explain(given.make_mask(), 8, 8, given.where())
    assert "light_seq" not in {row.method for row in found.methods}
    assert found.refused["light_seq"].startswith("cannot compute this mask: ")
    assert f"light_seq: {found.refused['light_seq']}" in in_text(
        config(mask="full", explain=True), given.where(), found
    )


def test_on_many_ranks_the_best_few_are_simulated() -> None:
    world = ALL_RANKS + 1
    given = config(ranks=world, length=64 * world, explain=True)
    found = explain(given.make_mask(), 8, 8, given.where())
    assert [row.method for row in found.methods if row.simulated_s is not None] == [
        row.method for row in found.methods[:BEST]
    ]
    assert f"only the best {BEST} are simulated" in in_text(given, given.where(), found)


def test_one_rank_has_nothing_to_send() -> None:
    given = config(ranks=1)
    found = explain(given.make_mask(), 8, 8, given.where())
    assert found.methods[0].max_sent_bytes == 0 and "inf" not in " ".join(found.reasons)


def test_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, file = tmp_path / "trace", tmp_path / "deep" / "plan.json"
    assert main(["plan", "--explain", "--trace", str(trace), "--json", str(file), *SMALL]) == 0
    said = capsys.readouterr().out
    values = json.loads(file.read_text())
    assert f"method   {values['forward_method']} forward, {values['backward_method']} backward" in said
    assert f"layout   {values['layout']}" in said and all(reason in said for reason in values["reasons"])
    assert values["problem"]["ranks"] == 3 and {row["method"] for row in values["methods"]} >= {"ring", "ulysses"}
    assert sorted(path.name for path in trace.iterdir()) == [
        "backward.json", "backward.svg", "forward.json", "forward.svg",
    ]  # fmt: skip
    events = json.loads((trace / "forward.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2}
    assert main(["plan", *SMALL]) == 0
    brief = capsys.readouterr().out
    assert said.startswith(brief.rstrip("\n")) and "simulated" not in brief


@pytest.mark.parametrize("name", PATTERNS)
def test_every_mask_has_a_choice(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--mask", name, *SMALL]) == 0
    assert f"{name} mask, 1,000 tokens over 3 ranks on h100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mask casual", "unknown mask 'casual'; known: full, causal"),
        ("--topology h300", "unknown topology 'h300'; known: a10_pcie"),
        ("--topology port", "port and mesh need a rate"),
        ("--rate 100mbit", "presets have their own, got topology h100 and rate 100mbit"),
        ("--topology mesh --rate fast", "a rate must be a number with bit"),
        ("--device h300", "unknown device profile 'h300'"),
        ("--device nowhere.json", "no device profile can be read from 'nowhere.json'"),
        ("--dtype fp8", "'fp8' for argument '--dtype'"),
        ("--heads 6 --kv-heads 4", "query heads must be a multiple of KV heads, got 6 and 4"),
        ("--ranks 0", "sizes must be at least 1"),
        (
            "--ranks 129 --length 9999",
            "estimates times on up to 128 ranks and takes a default",
        ),
        ("--ranks 2000", "every rank needs a token, got 1000 tokens for 2000 ranks"),
        ("--mask causal_document --histogram nowhere.json", "no histogram can be read from 'nowhere.json'"),
        ("--mask causal_document --histogram {list}", "a histogram maps bins like '[0,32)' to weights, got list"),
    ],
)
def test_bad_input_is_one_line(options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[1]")
    argv = [option.format(list=tmp_path / "list.json") for option in options.split()]
    assert main(["plan", *SMALL, *argv]) == 2  # later options overrule earlier ones
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
