"""The page of a benchmark, a check or a soak: title, setting, verdicts, sections. All of them are written here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncflow.files import write_atomically
from tools.bench.common.report import Finding, to_table


@dataclass(frozen=True)
class Page:
    """A page in the order in which it is read; what is empty is left out.

    Attributes:
        title: Its heading.
        introduction: Before the setting: what is asked, or a picture.
        setting: Hardware, commit, versions, command: a Markdown list, and a block of commands.
        findings: Rows of the table of verdicts.
        measured: Head of their column of figures.
        sections: What follows, each a Markdown text.
    """

    title: str
    introduction: str = ""
    setting: str = ""
    findings: Sequence[Finding] = ()
    measured: str = "measured"
    sections: Sequence[str] = ()

    def text(self) -> str:
        """Return the Markdown: blocks with an empty line between them."""
        table = to_verdicts(self.findings, self.measured) if self.findings else ""
        blocks = [f"# {self.title}", self.introduction, self.setting, table, *self.sections]
        return "\n\n".join(block.strip("\n") for block in blocks if block.strip()) + "\n"

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.text().encode())


def to_verdicts(findings: Sequence[Finding], measured: str = "measured") -> str:
    """Return the table of verdicts: every page has this one."""
    rows = [[found.what, found.measured, found.target, found.verdict] for found in findings]
    return to_table(["what", measured, "target", "met"], rows)


def to_list(lines: Sequence[str]) -> str:
    """Return a Markdown list whose lines are no longer than a page's."""
    return "\n".join(
        textwrap.fill(
            line, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )
