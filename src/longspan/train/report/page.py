"""The report's page: sections in order, put together and written in one piece."""

from __future__ import annotations

import os
from pathlib import Path

from longspan.train.markup import Child, Raw, join, tag
from longspan.train.report import curves, sections, step_timeline
from longspan.train.report.data import ReportData
from longspan.train.report.figures import nothing
from longspan.train.report.style import CSS, SCRIPT


def write_report(path: str | Path, report: ReportData) -> Path:
    """Writes the page to ``path`` (its folder is made), whole or not at all; returns the absolute path.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(render_report(report), encoding="utf-8")
    os.replace(temporary, target)
    return target


def render_report(report: ReportData) -> str:
    """The page as text: well-formed XML and HTML, no reference to anything outside itself."""
    contents: tuple[tuple[str, str, Child], ...] = (
        ("headline", "Held-out bits per byte", sections.headline(report)),
        ("loss", "Loss", curves.loss(report)),
        ("throughput", "Throughput and memory", curves.throughput(report)),
        ("optimizer", "Learning rate and gradient", curves.optimizer(report)),
        ("plan", "Plan: what each rank holds", sections.plan(report)),
        ("ownership", "Who holds which tokens", sections.ownership(report)),
        ("step", "Timeline of one training step", step_timeline.step(report)),
        ("timeline", "Timeline of one attention schedule", sections.timeline(report)),
        ("sample", "Sampled completion", sections.sample(report)),
        ("config", "Resolved config", sections.settings(report.config, "Show the config", "no config was given")),
        ("hardware", "Hardware and versions", sections.hardware(report)),
        (
            "command",
            "Command",
            tag("pre", report.command) if report.command else nothing("no command was given"),
        ),
    )
    links = [tag("a", title, href=f"#{name}") for name, title, _ in contents]
    notes = [tag("li", note) for note in report.notes]
    header = tag(
        "header",
        tag("h1", report.title),
        tag("p", report.summary, class_="lead") if report.summary else None,
        tag("ul", notes) if notes else None,
        tag("nav", links, aria_label="sections"),
    )
    body = [
        tag("section", tag("h2", title, id=f"{name}-title"), content, id=name, aria_labelledby=f"{name}-title")
        for name, title, content in contents
    ]
    footer = tag("footer", "Written by longspan. This page needs no network; hovering over a curve shows its values.")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", report.title),
        tag("style", CSS),
    )
    page = tag("html", head, tag("body", tag("main", header, body, footer), tag("script", SCRIPT)), lang="en")
    return join([Raw("<!DOCTYPE html>\n"), page, Raw("\n")])
