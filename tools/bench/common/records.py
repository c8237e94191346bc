"""Benchmarks of several parts: where they write, records of finished parts, and how a page reports them.

Owns the files under `docs/benchmarks/data/`. It must not know what a part measures: a benchmark's settings say what a
part depends on, and its own modules what follows from the figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tools.bench.common.report import (
    REPOSITORY,
    describe_command,
    describe_machine,
    describe_setting,
    describe_software,
)

PAGES = REPOSITORY / "docs" / "benchmarks"

Records = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PartSettings:
    """How much a benchmark measures: a frozen dataclass that says on which of its fields a part depends.

    Attributes:
        DEPENDS: Part -> names of fields; a record is good for other settings that agree in these.
        UNTIMED: Parts for which any machine will do.
    """

    DEPENDS: ClassVar[Mapping[str, Iterable[str]]]
    UNTIMED: ClassVar[frozenset[str]] = frozenset()

    def of(self, part: str) -> dict[str, Any]:
        """Return what a part depends on, as a file holds it."""
        return select(self, self.DEPENDS[part])

    def is_timed(self, part: str) -> bool:
        """Tell whether the machine matters."""
        return part not in self.UNTIMED


@dataclass(frozen=True)
class Place:
    """Where a call writes.

    Attributes:
        name: Of the benchmark, with which its files begin.
        out: Run folders and profiles, which may be thrown away afterwards.
        data: Records and tables.
        pages: The page and its pictures.
    """

    name: str
    out: Path
    data: Path
    pages: Path

    @property
    def page(self) -> Path:
        """The page."""
        return self.pages / f"{self.name}.md"

    def record(self, part: str) -> Path:
        """Return the file that a finished part leaves."""
        return self.data / f"{self.name}_{part}.json"

    def picture(self, part: str) -> Path:
        """Return a part's picture."""
        return self.pages / f"{self.name}_{part}.png"


MeasurePart = Callable[[Any, Place], dict[str, Any]]
"""(the benchmark's settings, where it writes) -> figures."""


def choose_place(name: str, out: Path, is_tiny: bool) -> Place:
    """Return where a benchmark writes; what a tiny call measures must not overwrite the page."""
    pages = out / "pages" if is_tiny else Path(os.path.relpath(PAGES))
    return Place(name, out, pages / "data", pages)


def select(settings: object, names: Iterable[str]) -> dict[str, Any]:
    """Return some of the settings, as a file holds them."""
    values: dict[str, Any] = json.loads(json.dumps({name: getattr(settings, name) for name in names}))
    return values


# Records.


def write_record(place: Place, part: str, settings: PartSettings, figures: dict[str, Any], seconds: float) -> None:
    """Write what a part found and how, in one step: a file that is there is whole."""
    place.data.mkdir(parents=True, exist_ok=True)
    record = {
        "part": part,
        "command": describe_command(),
        "machine": describe_machine(),
        "software": describe_software(),
        "seconds": seconds,
        "settings": settings.of(part),
        "figures": figures,
    }
    path = place.record(part)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def read_record(place: Place, part: str) -> dict[str, Any] | None:
    """Return what a part left; None if it is not finished."""
    path = place.record(part)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def read_records(place: Place, parts: Iterable[str]) -> Records:
    """Return the records that there are, by part."""
    found = {part: read_record(place, part) for part in parts}
    return {part: record for part, record in found.items() if record is not None}


def is_measured(place: Place, part: str, settings: PartSettings) -> bool:
    """Tell whether a part is finished.

    Raises:
        SystemExit: It is, but with other settings or on another machine, so that the page would mix them.
    """
    record = read_record(place, part)
    if record is None:
        return False
    if record["settings"] != settings.of(part):
        raise SystemExit(f"{place.record(part)} was measured with other settings; remove it to measure anew")
    if settings.is_timed(part) and record["machine"] != describe_machine():
        raise SystemExit(f"{place.record(part)} was measured on another machine; remove it to measure anew")
    return True


def figures_of(place: Place, part: str) -> dict[str, Any]:
    """Return what a part found that another one needs.

    Raises:
        SystemExit: It is not finished.
    """
    record = read_record(place, part)
    if record is None:
        raise SystemExit(f"part {part} comes first: {place.record(part)} is missing")
    figures: dict[str, Any] = record["figures"]
    return figures


def measure(parts: Mapping[str, MeasurePart], settings: PartSettings, place: Place) -> None:
    """Measure what is not finished, one part after the other.

    Raises:
        SystemExit: A part failed, or what is finished was measured otherwise.
    """
    is_finished = {part: is_measured(place, part, settings) for part in parts}  # refused before anything is measured
    for part, measure_part in parts.items():
        if is_finished[part]:
            print(f"{part}: measured already ({place.record(part)})", flush=True)
            continue
        print(f"{part}: measuring", flush=True)
        start = time.perf_counter()
        figures = measure_part(settings, place)
        seconds = time.perf_counter() - start
        write_record(place, part, settings, figures, seconds)
        print(f"{part}: {seconds / 60:.1f} min", flush=True)


# What a page says of them.


def describe_records(records: Records, more_setting: str = "") -> str:
    """Return the setting and the commands; `more_setting` is a line, or nothing, that belongs to the setting."""
    first = next(iter(records.values()))
    commits = sorted({record["software"]["commit"] for record in records.values()})
    setting = describe_setting(first["machine"], first["software"] | {"commit": "`, `".join(commits)}) + more_setting
    calls = list(dict.fromkeys(record["command"] for record in records.values()))
    inner = [record["figures"]["command"] for record in records.values() if "command" in record["figures"]]
    parts = ", ".join(f"{part} {_describe_minutes(record)}" for part, record in records.items())
    block = "\n".join(["```", *calls, *(f"# {command}" for command in inner), "```"])
    note = "\nLines with `#` are what these run." if inner else ""
    return f"{setting}- Minutes of each part, and its commit: {parts}\n\n{block}{note}\n"


def _describe_minutes(record: dict[str, Any]) -> str:
    minutes = "" if record["seconds"] is None else f"{record['seconds'] / 60:.1f} "
    return f"{minutes}(`{record['software']['commit'][:7]}`)"


def read_remarks(place: Place) -> list[str]:
    """Return what stands by hand beside the records: what was repeated, and why; nothing if there is no such file."""
    path = place.data / f"{place.name}_remarks.md"
    return [path.read_text(encoding="utf-8")] if path.exists() else []
