"""The pages that tools make are current, `docs/always_holds.md` names only tests that exist, and lines are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from tools.handbook import always_holds, commands, picture, wrap

TESTS = {"run/test_a.py": ["test_one", "test_two"], "envs/test_b.py": ["test_two"]}


def test_the_page_of_promises_is_current() -> None:
    assert always_holds.PAGE.read_text() == always_holds.page(), "run `make docs`"


def test_every_promise_is_held_by_a_test_that_is_not_slow() -> None:
    """`make test` leaves the slow ones out."""
    quick: dict[str, set[str]] = {}
    for path in always_holds.TESTS.rglob("test_*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        decorated = {node.name: [ast.unparse(each) for each in node.decorator_list] for node in functions}
        names = {name for name, marks in decorated.items() if "pytest.mark.slow" not in marks}
        quick[path.relative_to(always_holds.TESTS).as_posix()] = names | {""}
    tests = always_holds.find_tests()
    for section in yaml.safe_load(always_holds.SOURCE.read_text()):
        for promise in section["promises"]:
            located = [always_holds.locate(named, tests) for named in promise["tests"]]
            assert [function for file, function in located if function in quick[file]], promise["says"]


def test_tests_are_found_by_their_names_without_being_run(tmp_path: Path) -> None:
    folder = tmp_path / "envs"
    folder.mkdir()
    (folder / "test_b.py").write_text("raise SystemExit\ndef test_x(): ...\nclass TestY:\n    def test_y(self): ...\n")
    (folder / "helper.py").write_text("def test_no_test(): ...\n")
    assert always_holds.find_tests(tmp_path) == {"envs/test_b.py": ["test_x", "test_y"]}


def test_a_name_is_found_by_its_function_its_file_or_both() -> None:
    assert always_holds.locate("test_one", TESTS) == ("run/test_a.py", "test_one")
    assert always_holds.locate("envs/test_b.py", TESTS) == ("envs/test_b.py", "")
    assert always_holds.locate("envs/test_b.py::test_two", TESTS) == ("envs/test_b.py", "test_two")


@pytest.mark.parametrize("named", ["test_three", "run/test_b.py", "envs/test_b.py::test_one"])
def test_a_test_that_does_not_exist_is_refused_by_name(named: str) -> None:
    with pytest.raises(ValueError, match=f"'{named}', which does not exist"):
        always_holds.locate(named, TESTS)


def test_a_name_of_several_tests_is_refused_with_their_files() -> None:
    with pytest.raises(ValueError, match=r"'test_two', which is in run/test_a\.py, envs/test_b\.py"):
        always_holds.locate("test_two", TESTS)


def test_a_promise_stands_above_its_tests_by_file() -> None:
    promise = {"says": "It holds.", "tests": ["test_one", "run/test_a.py::test_two", "envs/test_b.py"]}
    page = always_holds.write_page([{"heading": "All", "promises": [promise]}], TESTS)
    assert page.endswith(
        "## All\n\n- It holds.\n    - `run/test_a.py`: `test_one`, `test_two`\n    - `envs/test_b.py`\n"
    )


def test_the_picture_is_current() -> None:
    assert picture.PAGE.read_text() == picture.draw(), "run `make docs`"


WRITTEN_BY_TOOLS = {"always_holds.md", "metrics.md", "reliability.md"}
PAGES = [path for path in commands.pages() if path.name not in WRITTEN_BY_TOOLS]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_line_of_a_page_is_longer_than_120(path: Path) -> None:
    assert wrap.long_lines(path.read_text()) == [], f"run `python -m tools.handbook.wrap {path}`"


def test_paragraphs_and_lists_are_wrapped_and_code_and_tables_are_not() -> None:
    words = " ".join(["word"] * 40)
    kept = f"# {words}\n\n| {words} |\n\n```\n{words}\n```\n\n    {words}\n"
    assert wrap.wrap(kept) == kept
    lines = wrap.wrap(f"- {words}\n  more\n- short\n").splitlines()
    assert [line[:2] for line in lines] == ["- ", "  ", "- "]
    assert max(map(len, lines)) <= 120
    assert " ".join(lines).split() == f"- {words} more - short".split()


def test_a_sum_never_begins_a_line_as_a_list_would() -> None:
    lines = wrap.wrap("collected = " + " + ".join(["trained"] * 30) + "\n").splitlines()
    assert len(lines) > 1
    assert not any(line.startswith("+") for line in lines)
