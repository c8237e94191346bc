"""A hook of MkDocs: adds the pages that do not lie in `docs/`, and mends what Python-Markdown reads otherwise.

README, ARCHITECTURE and the like become pages. The public names get an API page, and so does every module, which
mkdocstrings fills with their docstrings. Links between pages are turned to their places on the site; a link to a file
that is no page, such as an example, becomes its text. Python-Markdown wants a blank line before every list and table.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import asyncflow
from tools import rooms

REPOSITORY = Path(__file__).parents[2]
DOCS = "docs"
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
PUBLIC_NAMES = "api/asyncflow.md"
LINK = re.compile(r"(?<!`)(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
BLOCK = re.compile(r"(?:[-*] |\d+\. |\|)")
FENCE = re.compile(r"\s*```")


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation: rooms in their order, modules by name."""
    pages = [{room: [{name.rpartition(".")[2]: _api_path(name)} for name in names]} for room, names in _modules()]
    config.nav.append({"API": [{"Public names": PUBLIC_NAMES}, *pages]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in `docs/`."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text()))
    public = "\n".join(f"::: asyncflow.{name}\n    options: {{show_root_heading: true}}\n" for name in public_names())
    files.append(File.generated(config, PUBLIC_NAMES, content=f"# Public names\n\n{public}"))
    for name in (name for _, names in _modules() for name in names):
        text = f"# asyncflow.{name}\n\n::: asyncflow.{name}\n"
        files.append(File.generated(config, _api_path(name), content=text))
    return files


def public_names() -> list[str]:
    """Return what `import asyncflow` offers: classes and functions, without the version."""
    return [name for name in asyncflow.__all__ if name != "__version__"]


def _modules() -> list[tuple[str, list[str]]]:
    """Return the rooms with the names of their modules, without the folders' own."""
    sources = [name for name, path in rooms.SOURCES.items() if path.name not in ("__init__.py", "__main__.py")]
    return [(room, [name for name in sources if rooms.room_of(name) == room]) for room in rooms.ROOMS]


def _api_path(name: str) -> str:
    return f"api/{name.replace('.', '/')}.md"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page's text with links as the site needs them, and with blank lines before its lists and tables."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    source = {to: path for path, to in ROOT_PAGES.items()}.get(page.file.src_uri, f"{DOCS}/{page.file.src_uri}")
    return separate_blocks(turn_links(markdown, source, page.file.src_uri, files))


def turn_links(markdown: str, source: str, page: str, files: Files) -> str:
    """Return the text of the repository's file `source` with its links as they must stand on the site's `page`."""
    return LINK.sub(lambda link: _turn(link, source, page, files), markdown)


def _turn(link: re.Match[str], source: str, page: str, files: Files) -> str:
    text, (path, _, fragment) = link[1], link[2].partition("#")
    if not path or ":" in path:
        return link[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    place = ROOT_PAGES.get(target, target.removeprefix(f"{DOCS}/"))
    if not (REPOSITORY / target).exists():
        return link[0]  # MkDocs names it
    if files.get_file_from_path(place) is None:
        return text[1:-1]
    return f"{text}({os.path.relpath(place, posixpath.dirname(page) or '.')}{'#' if fragment else ''}{fragment})"


def separate_blocks(markdown: str) -> str:
    """Return a text with a blank line before every list, table and fenced block that follows a paragraph."""
    lines: list[str] = []
    fenced = listed = False
    for line in markdown.splitlines():
        fence, block = bool(FENCE.match(line)), bool(BLOCK.match(line))
        if lines and lines[-1].strip() and not fenced and (fence or (block and not listed)):
            lines.append("")
        fenced ^= fence
        listed = bool(line.strip()) and (listed or block) and not fence
        lines.append(line)
    return "\n".join(lines) + "\n"
