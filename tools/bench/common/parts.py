"""Benchmarks whose parts leave rows of a table and notes: measured into records, from which the page is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from tools.bench.common.pages import Page, to_list
from tools.bench.common.records import (
    PartSettings,
    Place,
    Records,
    describe_records,
    measure,
    read_records,
    read_remarks,
)
from tools.bench.common.report import Finding, Part, conclude

S = TypeVar("S", bound=PartSettings)


@dataclass(frozen=True)
class FindingParts(Generic[S]):
    """A benchmark of such parts.

    Attributes:
        name: With which its files begin.
        title: Of its page.
        parts: What measures each part, in order.
        notes: What the page says below the table.
    """

    name: str
    title: str
    parts: Mapping[str, Callable[[S], Part]]
    notes: str = ""

    def run(self, asked: Sequence[str], settings: S, place: Place) -> int:
        """Measure what is asked for and not finished, write the page of all that is, and return the exit code.

        Raises:
            SystemExit: Nothing was measured yet.
        """
        measure({part: self._measure(part) for part in self.parts if part in asked}, settings, place)
        records = read_records(place, self.parts)
        if not records:
            raise SystemExit(f"{place.data} holds no {self.name}_*.json; call without --page first")
        page = self.make_page(place, records)
        page.write(place.page)
        return conclude(page.findings, [part for part in self.parts if part not in records])

    def make_page(self, place: Place, records: Records) -> Page:
        """Return the page of all parts that are finished."""
        parts = [read_part(record["figures"]) for record in records.values()]
        return Page(
            self.title,
            setting=describe_records(records, "".join(f"- {line}\n" for part in parts for line in part.setting)),
            findings=[found for part in parts for found in part.findings],
            sections=[to_list([note for part in parts for note in part.notes]), self.notes, *read_remarks(place)],
        )

    def _measure(self, part: str) -> Callable[[S, Place], dict[str, Any]]:
        return lambda settings, place: asdict(self.parts[part](settings))


def read_part(figures: dict[str, Any]) -> Part:
    """Return what a record holds of a part."""
    return Part([Finding(**found) for found in figures["findings"]], figures["notes"], figures["setting"])
