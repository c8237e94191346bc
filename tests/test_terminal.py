"""Commands work whatever standard output and error are: closed, full, without a reader, of a small alphabet."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TextIO

import pytest

from asyncflow.terminal import LossyFile

COMMAND = f"{sys.executable} -m asyncflow"


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as bash does."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=os.environ | environment,
        capture_output=True,
        encoding="latin-1",
        check=False,
    )


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "| true"])
def test_a_command_works_without_its_streams(streams: str) -> None:
    result = run(f"{COMMAND} tasks {streams}")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_mistake_keeps_its_exit_code_when_nobody_can_be_told() -> None:
    assert run(f"{COMMAND} trian 2>&-").returncode == 2


def test_the_number_of_a_closed_stream_is_not_given_to_a_file() -> None:
    """A library that prints by number would write into it."""
    opened = "from asyncflow.terminal import prepare_streams as go; go(); import os, sys; os._exit(os.open('.', 0))"
    assert run(f'{sys.executable} -c "{opened}" <&- >&- 2>&-').returncode == 3


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"gr\xf6\xdfe \u2603"), ("latin-1", "größe \\u2603")])
def test_characters_that_the_output_lacks_are_replaced(encoding: str, shown: str) -> None:
    command = f"{COMMAND} config 'policy.vla.instruction=größe \N{SNOWMAN}'"
    result = run(command, PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"policy.vla.instruction\t{shown}\t" in result.stdout


def test_what_cannot_be_written_is_lost_as_text_and_as_bytes() -> None:
    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    text: TextIO = io.TextIOWrapper(io.BufferedWriter(Full(), 1), write_through=True)
    file = LossyFile(text)
    assert file.write("text") == 4
    assert file.buffer.write(b"bytes") == 5
    file.flush()
    file.buffer.flush()


def test_a_stream_that_other_code_closes_ends_nothing() -> None:
    stream = io.StringIO()
    file = LossyFile(stream)
    stream.close()
    assert file.write("lost") == 4
    file.flush()
