"""Records: which rows of a log are gone on from, the head, quartiles, and the commit of a checkout."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from longspan.bench import record
from longspan.bench.record import append_row, head, key, quartiles, read_rows, versions


def test_only_good_rows_of_the_same_versions_are_kept(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    good = {"cell": {"a": 1}, "versions": {"torch": "2"}, "status": "ok"}
    refused = {**good, "cell": {"a": 3}, "status": "refused"}
    for row in (
        {**good, "time": 1},
        good,
        {**good, "cell": {"a": 2}, "versions": {"torch": "1"}},
        {**good, "cell": {"a": 4}, "status": "failed"},
        {**good, "cell": {"a": 5}, "status": "red"},
        refused,
    ):
        append_row(log, row)
    with log.open("a") as file:
        file.write('{"run": "cut sho')
    assert read_rows(log, {"torch": "2"}) == {key({"a": 1}): good, key({"a": 3}): refused}
    assert not read_rows(tmp_path / "absent.jsonl", {"torch": "2"})


def test_quartiles() -> None:
    assert quartiles([3.0, 1.0, 2.0]) == [1.5, 2.0, 2.5]
    assert quartiles([7.0]) == [7.0] * 3


def test_a_head_says_what_ran(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/longspan", "bench", "kernels", "--out", "my runs"])
    made = json.loads(json.dumps(head("kernels", "today")))
    assert made["command"] == "longspan bench kernels --out 'my runs'"
    assert made["suite"] == "kernels" and made["date"] == "today" and made["versions"] == versions()
    assert made["hardware"][0].startswith("cpu: ")


def test_the_commit_is_that_of_a_checkout_only(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = record.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)
    copy = tmp_path / "record.py"
    copy.write_text("")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # of somebody who has it installed
    monkeypatch.setattr(record, "__file__", str(copy))
    assert record.commit() is None
