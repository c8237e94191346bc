"""Wrap the paragraphs and lists of Markdown pages at 120 characters.

python -m tools.handbook.wrap README.md docs/async.md    # rewrites what is longer

Tables, headings, pictures and code keep their lines.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 120
BULLET = re.compile(r"( *)([-*]|\d+\.) +")
KEPT = re.compile(r" *(\||#|!\[|<|```)")
# A line that began with one of these would be a list.
SIGN = re.compile(r" ([-+*]|\d+\.) ")


def wrap(markdown: str) -> str:
    """Return a page with its long paragraphs and list items wrapped."""
    done: list[str] = []
    held: list[str] = []
    is_code = in_list = False

    def flush() -> None:
        done.extend(_wrap_block(held) if any(len(line) > WIDTH for line in held) else held)
        held.clear()

    for line in markdown.splitlines():
        is_fence = line.lstrip().startswith("```")
        is_bullet = bool(BULLET.match(line))
        is_indented = line.startswith("    ") and not in_list and not held
        if is_code or is_fence or not line.strip() or KEPT.match(line) or (is_indented and not is_bullet):
            flush()
            is_code ^= is_fence
            done.append(line)
            in_list = in_list and (not line.strip() or line.startswith(" "))
            continue
        if is_bullet or (held and _indent(line) < _indent(held[0]) and not BULLET.match(held[0])):
            flush()
        in_list = is_bullet or (in_list and (bool(held) or line.startswith(" ")))
        held.append(line)
    flush()
    return "\n".join(done) + "\n"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wrap_block(lines: list[str]) -> list[str]:
    bullet = BULLET.match(lines[0])
    first = bullet[0] if bullet else " " * _indent(lines[0])
    words = " ".join([lines[0][len(first) :], *(line.strip() for line in lines[1:])])
    held = SIGN.sub(lambda sign: f"\0{sign[1]}\0", words)
    wrapped = textwrap.wrap(
        held, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\0", " ") for line in wrapped]


def long_lines(markdown: str) -> list[str]:
    """Return the lines of a page that wrapping would change."""
    kept = set(wrap(markdown).splitlines())
    return [line for line in markdown.splitlines() if line not in kept]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(wrap(path.read_text()))
