"""The notebook's cells are those of its source, they run, and what they printed is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

import asyncflow as af
from tools.handbook import notebook

CELLS = list(notebook.read_cells(notebook.SOURCE.read_text()))
SMALL = {"num_envs=16": "num_envs=2, horizon=12, num_workers=1", "buffer_size=960": "buffer_size=32"}
SMALL |= {
    "num_episodes=30": "num_episodes=2",
    "num_updates = 4": "num_updates = 1",
    "clip_coef": "num_minibatches=1, clip_coef",
}
CODE = """import sys

print("told", file=sys.stdout)
2 + 3"""


def test_a_cells_outputs_are_what_it_prints_and_its_last_value():
    printed, value = notebook.run_cell(CODE, {})
    assert printed["text"] == ["told\n"]
    assert value["data"]["text/plain"] == ["5"]
    assert notebook.run_cell("x = 1", {}) == []


def test_cells_are_split_where_the_source_says():
    cells = notebook.read_cells('"""Doc."""\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\ny = 2\n')
    assert list(cells) == [(False, "# Title\n\nText."), (True, "x = 1\n\ny = 2")]


def test_the_notebook_is_that_of_its_source_and_keeps_every_output():
    written: dict[str, Any] = json.loads(notebook.NOTEBOOK.read_text())
    kinds = {"code": True, "markdown": False}
    assert [(kinds[cell["cell_type"]], "".join(cell["source"])) for cell in written["cells"]] == CELLS
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text = "".join(line for cell in code for out in cell["outputs"] for line in out.get("text", []))
    assert text.count("env steps  collector busy") == 5
    assert text.count("success ") == 2
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)


@pytest.mark.sim
def test_its_cells_run_with_smaller_numbers():
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in CELLS:
        code = cell.text
        for large, small in SMALL.items():
            code = code.replace(large, small)
        outputs = notebook.run_cell(code, names) if cell.is_code else []
        printed += [line for output in outputs for line in output.get("text", [])]
    assert isinstance(names["trainer"], af.Trainer)
    assert names["trainer"].progress.updates == 2
    assert len([line for line in printed if line.startswith("update")]) == 2
