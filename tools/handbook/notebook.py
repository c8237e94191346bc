"""Makes examples/lift.ipynb: runs its cells in one process and keeps what they print.

    python -m tools.handbook.notebook     # needs no Jupyter

The cells stand in `examples/lift.py`, each under a line `# %%`; text stands under `# %% [markdown]`, as comments.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE, NOTEBOOK = EXAMPLES / "lift.py", EXAMPLES / "lift.ipynb"


class Cell(NamedTuple):
    """A cell: text, or code."""

    is_code: bool
    text: str


def read_cells(source: str) -> Iterator[Cell]:
    """Yield the cells of a script in the percent format; what stands before the first one is left out."""
    for part in source.split("\n# %%")[1:]:
        kind, _, text = part.partition("\n")
        if kind.strip() == "[markdown]":
            yield Cell(False, "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()))
        else:
            yield Cell(True, text.strip())


def run_cell(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell among `names` and return its outputs: what it printed, and the value of a last expression."""
    tree = ast.parse(code)
    last = tree.body[-1] if tree.body else None
    last = last if isinstance(last, ast.Expr) else None
    tree.body = tree.body[:-1] if last else tree.body
    outputs: list[dict[str, Any]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(SOURCE), "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), str(SOURCE), "eval"), names)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def make_notebook(cells: list[Cell], outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a notebook (nbformat 4.5) of cells and the outputs of those of code."""
    made: list[dict[str, Any]] = []
    remaining, count = iter(outputs), 0
    for index, cell in enumerate(cells):
        common = {"id": f"cell-{index}", "metadata": {}, "source": _lines(cell.text)}
        if not cell.is_code:
            made.append({"cell_type": "markdown", **common})
            continue
        count += 1
        shown = [each | {"execution_count": count} if "execution_count" in each else each for each in next(remaining)]
        made.append({"cell_type": "code", **common, "execution_count": count, "outputs": shown})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> int:
    """Run the cells, and write the notebook."""
    cells = list(read_cells(SOURCE.read_text()))
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = [run_cell(cell.text, names) for cell in cells if cell.is_code]
    NOTEBOOK.write_text(json.dumps(make_notebook(cells, outputs), indent=1) + "\n")
    print(f"{NOTEBOOK}: {len(cells)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
