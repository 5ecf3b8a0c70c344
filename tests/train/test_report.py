"""The report: well-formed, self-contained, escaped, complete, and with the numbers it was given."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longspan.train.markup import Raw, clean, join, tag
from longspan.train.report import ReportData, render_report, write_report
from longspan.train.report.sections import verdict
from longspan.train.svg import thin, ticks

HOSTILE = "</script><b onload=x>&amp;\"'<!--]]> \x00\x1b[31m\ud800\ufffe \u202e"
SECTIONS = ["headline", "loss", "throughput", "optimizer", "plan", "ownership", "step", "timeline", "sample", "config"]
SECTIONS += ["hardware", "command"]
VOID = {"meta", "link", "br", "hr", "col", "img", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order; collects attributes and the text outside style and script."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    return parser


def profiled() -> list[dict[str, Any]]:
    """Ranges of steps 3 to 5 on three ranks: 10, 12 and 11 ms, of which forward takes 4 and backward 5."""
    rows: list[dict[str, Any]] = []
    for rank in range(3):
        begin = 0.0
        for step, whole in ((3, 10.0), (4, 12.0), (5, 11.0)):
            for name, start, length in (("step", 0.0, whole), ("forward", 0.5, 4.0), ("backward", 4.5, 5.0)):
                rows.append(
                    {"rank": rank, "step": step, "name": name, "start_ms": begin + start, "duration_ms": length}
                )
            begin += whole
    return rows


def example(**changes: Any) -> ReportData:
    steps = [
        {"kind": "step", "step": i, "loss": 3.0 / i, "tokens_per_s": 1000.0 + i, "memory_bytes": 10**8 + i,
         "learning_rate": 0.001, "gradient_norm": 0.5, "sequence_length": 512 if i < 9 else 1024, "time_s": 0.25 * i}
        for i in range(1, 14)
    ]  # fmt: skip
    moves = [
        {"rank": r, "step": t, "kind": "compute", "label": f"block {r}{t}", "start": 1.0 * t, "duration": 0.75,
         "area": 1000 + 10 * r + t}
        for r in range(3) for t in range(3)
    ] + [
        {"rank": r, "step": 0, "kind": "send", "label": "kv", "start": 0.0, "duration": 0.5, "bytes": 4096,
         "peer": (r + 1) % 3, "lane": "send"}
        for r in range(3)
    ]  # fmt: skip
    data: dict[str, Any] = {
        "title": "a run",
        "headline": [{"context": 512, "model": 3.28125, "bigram": 3.5625, "zlib": 2.75}],
        "steps": steps,
        "evals": [{"step": 13, "sequence_length": 1024, "loss": 2.71828}],
        "events": [{"step": 5, "message": "saved", "time_s": 1.0}],
        "ranks": [
            {
                "rank": r,
                "device": "cpu",
                "memory_bytes": 777_000_000 + r,
                "data": 0,
                "context": r,
                "layers": "all 2",
                "parameters": 1001 + r,
            }
            for r in range(3)
        ],
        "axes": {"data": 1, "context": 3},
        "num_parameters": 3210,
        "ranges": profiled(),
        "num_tokens": 97,
        "ownership": [[(0, 17, 1), (80, 97, 1)], [(17, 49, 1)], [(49, 80, 1)]],
        "layout": "zigzag",
        "timeline": moves,
        "time_unit": "ms",
        "schedule": "ring",
        "prompt": "def ",
        "completion": "main():",
        "config": {"model": {"dim": 64}, "seed": 7},
        "plan": {"context": 3},
        "hardware": {"cpu": "2 cores"},
        "versions": {"torch": "2.13"},
        "command": "longspan train --ranks 3",
        "metrics_file": "metrics.jsonl",
        "notes": ["NCCL is unverified"],
    }
    return ReportData(**{**data, **changes})


def values(page: str) -> list[str]:
    return [value for element, name, value in parse(page).attributes if (element, name) == ("data", "value")]


def test_every_section_is_there_and_says_what_it_was_given() -> None:
    page = parse(render_report(example()))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, name, value in page.attributes if name == "href"]
    assert links == SECTIONS
    text = " ".join(page.text)
    for words in (
        "zigzag",
        "ring",
        "main():",
        '"seed": 7',
        "2 cores",
        "2.13",
        "longspan train --ranks 3",
        "unverified",
    ):
        assert words in text, words
    assert "Nothing was recorded" not in text


def test_every_drawing_has_a_name_and_a_table() -> None:
    root = ElementTree.fromstring(render_report(example()).removeprefix("<!DOCTYPE html>\n"))
    drawings = [svg for svg in root.iter("svg") if svg.get("aria-hidden") != "true"]
    assert len(drawings) == 17  # eight figures at two widths, and the timeline of the schedule
    for svg in drawings:
        named = [svg.find(name) for name in ("title", "desc")]
        assert [element.get("id") for element in named if element is not None] == svg.get("aria-labelledby", "").split()
        assert all(element is not None and element.text for element in named)
    for name in ("headline", "loss", "throughput", "plan", "ownership", "step", "timeline"):
        section = next(s for s in root.iter("section") if s.get("id") == name)
        assert section.find(".//table") is not None, name


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render_report(example(prompt="see https://example.org/x", command="curl http://example.org"))
    for _, name, value in parse(page).attributes:
        assert name not in ("src", "srcset", "action", "data", "poster", "xlink:href", "onload", "onclick")
        assert name != "href" or value.startswith("#")
        assert "url(" not in value
    for part in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.S):
        assert not re.search(r"url\(|@import|https?:|//[a-z]|fetch|XMLHttp", part)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(parse(page).tags)


def test_numbers_in_the_tables_equal_the_input() -> None:
    data = example()
    shown = values(render_report(data))
    for rows in (data.steps, data.evals, data.ranks, data.headline, data.timeline, data.events, data.ranges):
        for row in rows:
            for name, value in row.items():
                if isinstance(value, int | float):
                    assert repr(value) in shown, (name, value)
    assert {"97", "17", "80"} <= set(shown)
    changed = [{**row, "loss": row["loss"] + 1e-9} for row in data.steps]
    assert set(values(render_report(replace(data, steps=changed)))) != set(shown)


def test_totals_of_the_timeline_and_the_ownership_follow_from_it() -> None:
    page = render_report(example())
    for rank in range(3):
        assert repr(3 * (1000 + 10 * rank) + 3) in values(page)
    assert ">18 %<" in page  # 2.25 of 2.75 ms busy
    assert "tokens together" not in page
    held_twice = render_report(example(ownership=[[(0, 97, 1)], [(5, 6, 1)]]))
    assert "The ranks hold 98 tokens together, but the sequence has 97" in held_twice


def test_hostile_text_is_escaped_everywhere() -> None:
    row = {
        "rank": 0,
        "step": 0,
        "kind": "send",
        "label": HOSTILE,
        "start": 0.0,
        "duration": 9.0,
        "lane": HOSTILE,
        "peer": 0,
    }
    data = example(
        title=HOSTILE, summary=HOSTILE, notes=[HOSTILE], layout=HOSTILE, schedule=HOSTILE, time_unit=HOSTILE,
        prompt=HOSTILE, completion=HOSTILE, command=HOSTILE, metrics_file=HOSTILE, timeline=[row],
        config={HOSTILE: HOSTILE}, plan={HOSTILE: [HOSTILE]}, hardware={HOSTILE: HOSTILE}, versions={HOSTILE: 1},
        events=[{"step": 1, "message": HOSTILE}], ranks=[{"rank": 0, HOSTILE: HOSTILE}],
        headline=[{"context": 1, "model": 1.0, HOSTILE: 2.0}],
    )  # fmt: skip
    page = render_report(data)
    parsed = parse(page)
    assert "b" in parsed.tags and not [a for a in parsed.attributes if a[1] == "onload"]
    assert parsed.tags.count("script") == 1 and page.count("</script") == 1
    assert "\x00" not in page and "\x1b" not in page
    page.encode()
    assert any("</script><b onload=x>&amp;\"'" in text for text in parsed.text)  # and comes out as it was


def test_a_page_without_data_says_so() -> None:
    page = parse(render_report(ReportData(title="nothing")))
    assert [v for _, n, v in page.attributes if n == "id" and v in SECTIONS] == SECTIONS
    assert " ".join(page.text).count("Nothing was recorded here") == len(SECTIONS)
    assert "svg" not in page.tags


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_short_and_long_histories(steps: int) -> None:
    page = render_report(example(steps=[{"step": i, "loss": 1.0} for i in range(1, steps + 1)], evals=[], ranks=[]))
    parse(page)
    assert not re.search(r'[ "]-?(nan|inf)\b', page)
    shown = re.search(r"Every (\d+)th of 500 rows", page)
    assert bool(shown) == (steps == 500)
    assert f'value="{steps}"' in page


def test_not_finite_is_seen() -> None:
    data = example()
    steps = [{**row, "loss": math.nan if row["step"] in (4, 7) else row["loss"]} for row in data.steps]
    headline = [{"context": 512, "model": math.nan, "bigram": 3.5, "zlib": None}]
    page = render_report(replace(data, steps=steps, headline=headline))
    text = " ".join(parse(page).text)
    assert "The loss is not finite at 2 of 13 steps: 4, 7" in text
    assert "has no finite figure" in text and "not a number" in text
    assert page.count('class="lost"') == 4  # two marks at two widths
    drawn = re.findall(r' d="([^"]*)"', page) + re.findall(r'(?:x|y|cx|cy|width|height|x1|y1)="([^"]*)"', page)
    assert not [d for d in drawn if "nan" in d or "inf" in d]
    nothing = [{**row, "loss": math.inf} for row in data.steps]
    assert "no finite values to draw" in render_report(replace(data, steps=nothing, evals=[]))


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (
            {"model": 3.0, "bigram": 3.5, "zlib": 2.5},
            "beats bigram by 0.500, and loses to zlib by 0.500 bits per byte.",
        ),
        ({"model": 2.0, "bigram": 3.5, "zlib": 2.5}, "beats bigram by 1.500 and zlib by 0.500 bits per byte."),
        ({"model": 4.0, "bigram": 3.5}, "loses to bigram by 0.500 bits per byte."),
        ({"model": 3.5001, "bigram": 3.5}, "is level with bigram."),
        (
            {"model": 3.5, "zlib": None},
            "needs 3.500 bits per byte; there is no baseline to compare it with (zlib not measured).",
        ),
        ({"model": None, "zlib": 2.0}, "was not measured."),
    ],
)
def test_verdict_says_who_wins(figures: dict[str, float | None], sentence: str) -> None:
    assert verdict({"context": 8192, **figures}) == f"At 8,192 tokens of context the model {sentence}"


def test_a_striped_layout_and_many_ranks() -> None:
    striped = [[(rank, 8192, 4)] for rank in range(4)]
    page = render_report(example(num_tokens=8192, ownership=striped))
    parse(page)
    assert "magnified: tokens 0 to 31" in page and len(page) < 400_000
    rows = [{"rank": r, "step": 0, "kind": "compute", "label": "b", "start": 0.0, "duration": 1.0} for r in range(20)]
    many = render_report(example(timeline=rows))
    assert "The first 16 ranks are drawn" in many and 'value="19"' in many
    one = [{**rows[0], "rank": 40, "area": None, "bytes": None, "peer": None}]
    assert "rank 40" in render_report(example(timeline=one))


def test_written_in_one_piece(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", example())
    assert path.is_absolute() and [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == render_report(example())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"path": Path("x")}}, r"plain.*PosixPath at config\['path'\]"),
        ({"config": {(1, 2): 3}}, "keys"),
        ({"ownership": [[(0, 98, 1)]]}, "segments"),
        ({"ownership": [[(5, 5, 1)]]}, "segments"),
        ({"ownership": [[(0, 5)]]}, "segments"),
        ({"timeline": [{"rank": 0}]}, "timeline needs"),
        ({"headline": [{"model": 3.0}]}, "headline needs"),
        ({"evals": [{"step": 1, "loss": 1.0}]}, "evals needs"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        example(**change)


@pytest.mark.parametrize("field", [{"kind": "wait"}, {"start": math.nan}, {"duration": -1.0}, {"duration": math.inf}])
def test_a_timeline_that_cannot_be_drawn_is_refused(field: dict[str, Any]) -> None:
    row = {"rank": 0, "step": 0, "kind": "compute", "label": "b", "start": 0.0, "duration": 1.0, **field}
    with pytest.raises(ValueError, match=r"timeline"):
        example(timeline=[row])


def test_markup_escapes_all_but_raw() -> None:
    assert tag("p", "a<b", Raw("<i></i>"), None, ["&", 3], class_='x"y', data_z=1.0, hidden=True, not_=False) == (
        '<p class="x&quot;y" data-z="1" hidden="hidden">a&lt;b<i></i>&amp;3</p>'
    )
    assert tag("br") == "<br/>" and tag("i") == "<i></i>"
    assert join(["<", Raw("<")]) == "&lt;<"
    assert clean("a\nb\t\x07\x7f\x85é") == "a\nb\t\u2407\u2421\ufffdé"


def test_ticks_are_round_inside_and_few() -> None:
    assert ticks(0, 300, 7) == [0, 50, 100, 150, 200, 250, 300]
    for low, high, most in ((1.97, 7.6, 6), (0, 1e-7, 4), (-5, 12345, 5), (1e12, 1e12 + 1, 3)):
        found = ticks(low, high, most)
        assert 2 <= len(found) <= most and low - 1e-6 <= found[0] and found[-1] <= high + 1e-6
    for bad in ((1, 1), (2, 1), (0, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="axis"):
            ticks(*bad, 3)


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(i), 100.0 if i == 777 else float(i % 7)) for i in range(5000)]
    kept = thin(points, 300)
    assert len(kept) <= 310 and (777.0, 100.0) in kept and kept == sorted(kept)


def test_hover_texts_match_the_curve() -> None:
    root = ElementTree.fromstring(render_report(example()).removeprefix("<!DOCTYPE html>\n"))
    chart = next(svg for svg in root.iter("svg") if svg.get("aria-labelledby", "").startswith("loss-wide"))
    rows = json.loads(chart.get("data-hover", ""))["rows"]
    assert len(rows) == 13 and rows[0][1] == "step 1: 3" and rows[0][0] < rows[-1][0]
