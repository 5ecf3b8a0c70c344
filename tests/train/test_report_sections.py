"""The report's plan picture and step timeline, and its words for what was not recorded."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from longspan.train.holdings import in_words
from longspan.train.report import render_report
from tests.train.test_report import example, parse, profiled


def test_layers_in_words() -> None:
    assert in_words([0, 1, 2], 3) == "all 3" and in_words([5, 0, 1, 2], 8) == "0–2, 5"


def test_the_step_drawn_is_the_median_and_the_table_has_means() -> None:
    page = render_report(example())
    assert "Step 5, of the profiled steps 3, 4, 5 the one of median length" in page
    assert page.count("rank 2, forward: 4 ms") == 2  # at two widths
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    section = next(s for s in root.iter("section") if s.get("id") == "step")
    rows = [[cell.get("value") for cell in row.iter("data")] for row in section.iter("tr")]
    assert ["1", "11.0", "4.0", "5.0", "2.0"] in rows
    headless = [{**row, "name": "forward"} for row in profiled()]
    assert "no step around them" in render_report(example(ranges=headless))


def test_the_plan_picture_has_a_box_for_each_rank_in_the_frame_of_its_rows() -> None:
    axes = {"data": 2, "context": 2, "pipeline": 2}
    ranks = [
        {
            "rank": r,
            "pipeline": r // 4,
            "data": r // 2 % 2,
            "context": r % 2,
            "layers": f"{r // 4}",
            "parameters": 7 + r,
        }
        for r in range(8)
    ]
    page = render_report(example(axes=axes, ranks=ranks))
    parse(page)
    for frame in ("pipeline 0, data 0", "pipeline 0, data 1", "pipeline 1, data 0", "pipeline 1, data 1"):
        assert page.count(f">{frame}</text>") == 2
    assert page.count("<title>rank 5: context 1, layers: 1, parameters: 12 of 3.21k") == 2
    assert "pipeline ranks share the layers" in page and "tensor ranks" not in page
    many = [{"rank": r, "context": r} for r in range(70)]
    page = render_report(example(axes={"data": 1, "context": 70}, ranks=many))
    assert "The first 64 of 70 ranks are drawn" in page and page.count("<title>rank 64:") == 0


def test_what_is_not_recorded_is_said() -> None:
    text = " ".join(parse(render_report(example())).text)
    assert "Model FLOPs utilisation: not recorded; it is known for" in text
    some = [{**row, "mfu": 0.4} if row["step"] > 3 else row for row in example().steps]
    text = " ".join(parse(render_report(example(steps=some))).text)
    assert "Model FLOPs utilisation: recorded at 10 of 13 steps." in text
    text = " ".join(parse(render_report(example(evals=[], ranges=[], axes={}))).text)
    assert "No held-out loss was recorded" in text and "no step was profiled" in text
    assert "no axes and ranks were given" in text
    bare = [{"step": row["step"], "loss": row["loss"]} for row in example().steps]
    text = " ".join(parse(render_report(example(steps=bare))).text)
    for name in ("Tokens per second, all ranks", "Learning rate", "Norm of the gradient, before clipping"):
        assert f"{name}: not recorded." in text
