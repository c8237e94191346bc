"""Every page whose data are among the documentation is what its writer makes of them, to the byte."""

import json
import shlex
from pathlib import Path

import pytest

from tools.bench.common.records import choose_place, read_records
from tools.bench.core.fast_step import FAST_STEP
from tools.bench.core.run import CORE
from tools.bench.learning import page as learning
from tools.bench.learning.curves import read_curves
from tools.bench.overlap import page as overlap
from tools.bench.overlap import run as overlap_run
from tools.bench.peers.run import PEERS
from tools.bench.policies import page as policies
from tools.bench.policies.judge import judge
from tools.bench.policies.parts import PARTS
from tools.soak import report as soak

REPOSITORY = Path(__file__).parents[2]
PAGES = REPOSITORY / "docs" / "benchmarks"
CURVES = sorted(str(path.relative_to(REPOSITORY)) for path in PAGES.rglob("learning.md"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def place_of(name):
    return choose_place(name, Path(), is_tiny=False)


@pytest.mark.parametrize("bench", [CORE, FAST_STEP, PEERS], ids=lambda bench: bench.name)
def test_a_page_of_findings_is_that_of_its_records(bench):
    place = place_of(bench.name)
    records = read_records(place, bench.parts)
    assert set(records) == set(bench.parts)
    assert bench.make_page(place, records).text() == place.page.read_text()


def test_the_page_on_overlap_is_that_of_its_records():
    place = place_of("overlap")
    records = read_records(place, overlap_run.PARTS)
    curves = overlap.read_all(place, records)
    assert overlap.make_page(place, records, curves, overlap.judge(records, curves)).text() == place.page.read_text()


def test_the_page_on_policies_is_that_of_its_records():
    place = place_of("policies")
    records = read_records(place, PARTS)
    assert policies.make_page(records, judge(records)).text() == place.page.read_text()


@pytest.mark.parametrize("path", CURVES)
def test_a_page_on_learning_is_that_of_its_curves(path, monkeypatch):
    text = (REPOSITORY / path).read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("python -m tools.bench.learning.page")]
    monkeypatch.setattr("sys.argv", ["page", *shlex.split(command)[3:]])
    options = learning.parse_arguments()
    meta = json.loads((options.data / "learning_meta.json").read_text())
    assert (options.out / "learning.md").resolve() == REPOSITORY / path
    assert learning.make_page(options, read_curves(options.data), meta, command).text() == text


def test_the_page_of_the_soak_is_that_of_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "draw_picture", lambda *_: None)
    findings = soak.write_page(PAGES / "data", tmp_path, 5.0, ["toy", "lift"])
    assert (tmp_path / "soak.md").read_text() == (PAGES / "soak.md").read_text()
    assert all(found.is_met for found in findings)
