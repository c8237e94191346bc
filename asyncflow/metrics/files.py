"""The files that rows of metrics go to: JSON lines, and TensorBoard's events. A full disk does not end a run.

Records are written whole. They wait in memory while the disk is full, and a resumed run cuts off those after its
checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from asyncflow.errors import ConfigError
from asyncflow.files import write_atomically

Row = Mapping[str, float | None]


class RecordFile:
    """A file that only grows, by whole records. What cannot be written waits in memory and keeps its order."""

    def __init__(self, path: Path, name: str) -> None:
        """Open or create the file; `name` is what its problems are reported under.

        Raises:
            ConfigError: It cannot be opened.
        """
        self._name, self._path, self._is_reachable = name, path, True
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        self._end = self._file.tell()
        self._waiting: list[bytes] = []

    def append(self, record: bytes) -> list[str]:
        """Write what waits, then `record`; return a line about the problem, if there is one."""
        self._waiting.append(record)
        return [*self._find_loss(), *self._write_waiting("waiting")]

    def _find_loss(self) -> list[str]:
        """Return a line when the file has just been removed, renamed or replaced: what is written goes nowhere then."""
        own = os.fstat(self._file.fileno())
        try:
            found: os.stat_result | None = self._path.stat()
        except OSError:
            found = None
        was_reachable, self._is_reachable = self._is_reachable, found is not None and os.path.samestat(own, found)
        if self._is_reachable or not was_reachable:
            return []
        return [f"{self._path}: was removed, renamed or replaced under the run; its rows are lost from here on"]

    def close(self) -> list[str]:
        """Write what waits and close; return a line about what is lost. May be called twice."""
        if self._file.closed:
            return []
        problems = self._write_waiting("lost")
        with suppress(OSError):
            self._file.close()
        return problems

    def _write_waiting(self, otherwise: str) -> list[str]:
        try:
            while self._waiting:
                self._write_whole(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            return [f"{self._name}: {error.strerror}; rows {otherwise}: {len(self._waiting)}"]
        return []

    def _write_whole(self, record: bytes) -> None:
        """Write a record, or nothing of it.

        Raises:
            OSError: It was not written.
        """
        self._cut()  # what an earlier attempt left, if it could not be cut then
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self._cut()
            raise
        self._end += len(record)

    def _cut(self) -> None:
        if self._file.seek(0, os.SEEK_END) > self._end:
            self._file.truncate(self._end)


class JsonLines(RecordFile):
    """`metrics.jsonl`: one JSON object a row."""

    def __init__(self, folder: Path) -> None:
        """Open the file; rows are appended to what it holds."""
        super().__init__(folder / "metrics.jsonl", "metrics.jsonl")

    def write(self, row: Row) -> list[str]:
        """Write a row; return a line about the problem, if there is one."""
        return self.append(json.dumps(row, allow_nan=False).encode() + b"\n")


class EventFile(RecordFile):
    """TensorBoard's events, one record a row.

    Its own writer is not used: that writes in a thread of its own, which dies of a full disk, with a traceback and in
    the middle of a record, behind which readers find nothing more.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Create the file; readers forget events of earlier files from step `purge_step` on."""
        with warnings.catch_warnings():  # of its dependencies; TensorBoard is imported only where it is used
            warnings.simplefilter("ignore")
            from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._encoder: Any = RecordWriter
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder / name, "TensorBoard")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._header = self._encode(file_version="brain.Event:2") + self._encode(step=purge_step, session_log=start)

    def write(self, row: Row) -> list[str]:
        """Write the numbers of a row at its `env_steps`; return a line about the problem, if there is one."""
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if value is not None
        ]
        event = self._encode(step=int(row["env_steps"] or 0), summary=self._summaries.Summary(value=values))
        header, self._header = self._header, b""
        return self.append(header + event)

    def _encode(self, **fields: Any) -> bytes:
        buffer = io.BytesIO()
        self._encoder(buffer).write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
        return buffer.getvalue()


def cut_rows(folder: Path, updates: int) -> int | None:
    """Remove rows of later updates than `updates`, and what is no whole row, from `metrics.jsonl`; atomically.

    Returns:
        The `env_steps` of the last row that is left; None if there is none.

    Raises:
        ConfigError: The shorter file cannot be written.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    rows = [(line, _parse_row(line)) for line in lines]
    kept = [(line, row) for line, row in rows if row is not None and row.updates <= updates]
    if len(kept) < len(lines):
        try:
            write_atomically(path, b"".join(line for line, _ in kept))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; the rows after update {updates} must be removed") from None
    return kept[-1][1].env_steps if kept else None


class _StoredRow(BaseModel):
    """The values that every line must hold; all other values are numbers or null."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    env_steps: int = Field(ge=0, lt=2**62)
    updates: int = Field(0, ge=0)


def _parse_row(line: bytes) -> _StoredRow | None:
    try:
        return _StoredRow.model_validate_json(line) if line.endswith(b"\n") else None
    except ValidationError:
        return None
