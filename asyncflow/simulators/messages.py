"""Messages between processes: JSON behind its length, over a pair of sockets; nothing that came is ever executed."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

_LENGTH = struct.Struct("<I")
_PIECE_BYTES = 65536


class Channel:
    """One end of a pair of sockets. Not for several threads at once."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected stream socket."""
        self.socket = end
        self._came = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for `select` and its like."""
        return self.socket.fileno()

    def send(self, message: Any) -> None:
        """Send a message; waits only while the other side has megabytes to read.

        Raises:
            OSError: The other side is gone.
        """
        text = json.dumps(message).encode()
        self.socket.sendall(_LENGTH.pack(len(text)) + text)

    def receive(self) -> Any:
        """Wait for the next message and return it.

        Raises:
            EOFError: The other side is gone.
        """
        while not self.has_message:
            self.read()
        return self.take()

    def read(self) -> None:
        """Read what has come of the next message, and nothing of what follows it; waits where nothing has.

        Raises:
            EOFError: The other side is gone.
        """
        num_wanted = (self._end if len(self._came) >= _LENGTH.size else _LENGTH.size) - len(self._came)
        try:
            piece = self.socket.recv(min(num_wanted, _PIECE_BYTES))
        except ConnectionError:  # it left without reading everything
            piece = b""
        if not piece:
            raise EOFError
        self._came += piece

    @property
    def has_message(self) -> bool:
        """Whether all of the next message has been read, for `take`."""
        return len(self._came) >= _LENGTH.size and len(self._came) >= self._end

    @property
    def _end(self) -> int:
        (length,) = _LENGTH.unpack_from(self._came)
        return _LENGTH.size + int(length)

    def take(self) -> Any:
        """Return the message that has been read."""
        text = bytes(self._came[_LENGTH.size :])
        self._came.clear()
        return json.loads(text)

    def close(self) -> None:
        """Close this end; may be called twice."""
        self.socket.close()
