"""The documentation builds as a site without a warning, and nothing in it is left as raw Markdown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.rooms import REPOSITORY, SOURCES

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
from tools.handbook import site_pages

CODE = re.compile(r"<(pre|code|script)\b.*?</\1>", re.DOTALL)
RAW = re.compile(r"<p>(?:(?!</p>).)*?\n(?:[-*] |\d+\. |\|)|\|---|```", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme's, about versions to come
    done = subprocess.run(command, cwd=REPOSITORY, env=quiet, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_no_list_table_or_code_is_left_as_text(site: Path) -> None:
    pages = {path: CODE.sub("", path.read_text()) for path in site.rglob("*.html")}
    assert [(path.name, found[0][-80:]) for path, text in pages.items() if (found := RAW.search(text))] == []


@pytest.mark.slow
def test_every_module_has_a_page(site: Path) -> None:
    modules = [name for name, path in SOURCES.items() if path.name not in ("__init__.py", "__main__.py")]
    assert [name for name in modules if not (site / "api" / f"{name.replace('.', '/')}.html").is_file()] == []


@pytest.mark.slow
def test_every_public_name_is_on_the_page_of_public_names(site: Path) -> None:
    page = (site / "api" / "asyncflow.html").read_text()
    missing = [name for name in site_pages.public_names() if f'<h2 id="asyncflow.{name}"' not in page]
    assert missing == []


def test_a_list_or_table_after_a_paragraph_gets_a_blank_line_and_code_does_not() -> None:
    text = "Words:\n- one\n  more\n- two\n\nWords:\n| a |\n|---|\n```\nx\n- y\n```\n"
    separate = "Words:\n\n- one\n  more\n- two\n\nWords:\n\n| a |\n|---|\n\n```\nx\n- y\n```\n"
    assert site_pages.separate_blocks(text) == separate


class Pages:
    """The pages of a site, as far as links need them."""

    def get_file_from_path(self, path: str) -> str | None:
        return path if path in ("index.md", "architecture.md", "async.md", "benchmarks/core.md") else None


@pytest.mark.parametrize(
    ("source", "page", "link", "turned"),
    [
        ("README.md", "index.md", "[a](docs/async.md#groups)", "[a](async.md#groups)"),
        ("docs/benchmarks/core.md", "benchmarks/core.md", "[a](../../README.md)", "[a](../index.md)"),
        ("docs/async.md", "async.md", "[code](../examples/my_vla.py)", "code"),
        ("docs/async.md", "async.md", "[part](#groups)", "[part](#groups)"),
        ("docs/async.md", "async.md", "[gone](gone.md)", "[gone](gone.md)"),
    ],
)
def test_a_link_leads_to_its_place_on_the_site(source: str, page: str, link: str, turned: str) -> None:
    assert site_pages.turn_links(link, source, page, Pages()) == turned
