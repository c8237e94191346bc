"""Draw `docs/how_it_works.svg`: processes, threads, ring and weights, and what goes between them.

python -m tools.handbook.picture    # writes the picture; `make docs` calls it
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.svg"
WIDTH, HEIGHT, TITLE = 960, 430, 16
BLUE, GREEN, ORANGE, PURPLE, GREY = "#1f6fb4", "#3aa655", "#e4580c", "#7b2d8e", "#555555"


def text(x: int, y: int, words: str, size: int = 14, colour: str = "#222222") -> str:
    """Return words centred at a point; a title is bold."""
    weight = ' font-weight="bold"' if size == TITLE else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="middle"{weight}>{words}</text>'


def box(place: tuple[int, int, int, int], colour: str, title: str, *lines: str) -> str:
    """Return a box at x, y with its width and height, a title and lines of text below it."""
    x, y, width, height = place
    middle = x + width // 2
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" fill-opacity="0.08" '
        f'stroke="{colour}" stroke-width="2"/>',
        text(middle, y + 26, title, TITLE, colour),
    ]
    parts += [text(middle, y + 50 + 20 * number, line) for number, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(points: list[tuple[int, int]], colour: str, words: str, at: tuple[int, int]) -> str:
    """Return an arrow along points, with words centred at a point beside it."""
    path = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#head)"/>'
    return line + "\n" + "\n".join(text(at[0], at[1] + 17 * n, line, 13) for n, line in enumerate(words.split("|")))


def slot(x: int, y: int, state: str, colour: str) -> str:
    """Return one slot of the ring."""
    rect = f'<rect x="{x}" y="{y}" width="92" height="34" fill="{colour}" fill-opacity="0.25" stroke="{colour}"/>'
    return rect + "\n" + text(x + 46, y + 22, state, 13)


def draw() -> str:
    """Return the picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<title>Worker processes run simulators; the collector thread acts and fills slots of the ring; the main "
        "thread trains on full slots and publishes weights, which the collector copies</title>",
        '<defs><marker id="head" markerWidth="10" markerHeight="8" refX="9" refY="4" orient="auto">'
        '<path d="M0,0 L10,4 L0,8 z" fill="#555555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        box((15, 160, 190, 100), GREEN, "Worker processes", "simulators execute", "chunks of actions"),
        box((350, 160, 190, 100), BLUE, "Collector thread", "acts with its own", "copy of the policy"),
        box((745, 160, 200, 100), ORANGE, "Main thread", "PPO update; then it", "evaluates, logs, saves"),
        box((535, 18, 215, 82), PURPLE, "Weights", "lag + 1 numbered versions"),
        box((530, 325, 225, 90), GREY, "Ring of lag + 1 rollouts"),
        slot(547, 363, "being filled", BLUE),
        slot(646, 363, "trained on", ORANGE),
        arrow([(350, 190), (207, 190)], GREY, "actions", (277, 180)),
        arrow([(205, 232), (348, 232)], GREY, "observations,|rewards", (277, 253)),
        arrow([(445, 260), (445, 382), (528, 382)], GREY, "writes|decisions", (400, 352)),
        arrow([(755, 382), (845, 382), (845, 262)], GREY, "takes the oldest|full rollout", (900, 352)),
        arrow([(845, 160), (845, 59), (752, 59)], GREY, "publishes|a version", (890, 92)),
        arrow([(535, 59), (445, 59), (445, 158)], GREY, "copies a version|before a rollout", (385, 92)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(draw())
