"""
Sends whole messages, and open files with them, between this process and a worker.

Not by `socket.send_fds` and `recv_fds`: they ignore their flags in Python 3.11, and MSG_NOSIGNAL
and MSG_CMSG_CLOEXEC are needed. Without the one, a dead worker would end a program that has set
SIGPIPE to its default; without the other, programs that are started meanwhile inherit the files.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"

from array import array
from contextlib import suppress
from errno import EMFILE
from socket import (
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    SCM_RIGHTS,
    SHUT_RDWR,
    SOL_SOCKET,
)
from struct import Struct
from typing import TYPE_CHECKING, Final

from polars_async._runtime.descriptors import above_standard_files
from polars_async._runtime.unpatched import RLock
from polars_async.executors.message import Message

if TYPE_CHECKING:
    # The interpreter's own class: under gevent's patch, `socket.socket` is green.
    from _socket import socket as Socket  # noqa: N812

_HEADER: Final = Struct("!QBB")
_DESCRIPTORS: Final = array("i")
_MAX_ANCILLARY: Final = 4096
_MAX_PIECE: Final = 1 << 20


class Transport:
    """One end of a socket. Any thread may send; one thread at a time may receive."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._lock = RLock()

    def send(self, message: Message) -> None:
        """
        Send `message`, and close its files.

        Raises
        ------
        EOFError
            The other end is gone.
        """
        header = _HEADER.pack(len(message.data), len(message.files), message.shared)
        rights = [(SOL_SOCKET, SCM_RIGHTS, array("i", message.files))] if message.files else []
        try:
            with self._lock:  # else another message could come between the parts of a large one
                sent = self._socket.sendmsg([header, message.data], rights, MSG_NOSIGNAL)
                if sent < len(header) + len(message.data):
                    self._socket.sendall(memoryview(header + message.data)[sent:], MSG_NOSIGNAL)
        except OSError as error:
            raise EOFError from error
        finally:
            message.close()

    def receive(self, timeout: float | None = None) -> Message:
        """
        Wait for a message.

        Raises
        ------
        TimeoutError
            Nothing has come for `timeout` seconds. A message that has begun to come is waited for.
        EOFError
            The other end is gone.
        """
        files: list[int] = []
        try:
            self._socket.settimeout(timeout)
            header, ancillary, _, _ = self._socket.recvmsg(
                _HEADER.size, _MAX_ANCILLARY, MSG_CMSG_CLOEXEC
            )
            for level, kind, data in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    came = array("i", data[: len(data) - len(data) % _DESCRIPTORS.itemsize])
                    files += map(above_standard_files, came)
            if timeout is not None:
                self._socket.settimeout(None)
            header += self._receive_exactly(_HEADER.size - len(header))
            size, number, shared = _HEADER.unpack(header)
            if len(files) < number:
                message = f"{number} files came, and this process may not open as many"
                raise OSError(EMFILE, message)  # noqa: TRY301  # as for any other error
            return Message(self._receive_exactly(size), files, shared)
        except ConnectionError as error:
            Message(b"", files).close()
            raise EOFError from error
        except BaseException:
            Message(b"", files).close()
            raise

    def is_open(self) -> bool:
        """Return whether the other end is open; with unread messages, it counts as open."""
        try:
            return bool(self._socket.recv(1, MSG_PEEK | MSG_DONTWAIT))
        except (BlockingIOError, TimeoutError):  # the latter where `receive` has left its time-out
            return True
        except OSError:  # closed here, or reset by the other end
            return False

    def close(self) -> None:
        """Close this end, and shut the connection down, even if a forked child has a copy of it."""
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)
        self._socket.close()

    def reset_after_fork(self) -> None:
        """Close the copy of a forked child, which leaves the parent's connection as it is."""
        self._socket.close()

    def _receive_exactly(self, size: int) -> bytes:
        if size == 0:
            return b""
        data = self._socket.recv(min(size, _MAX_PIECE))
        if len(data) == size:
            return data
        pieces = bytearray(data)
        while len(pieces) < size:
            if not data:
                raise EOFError
            data = self._socket.recv(min(size - len(pieces), _MAX_PIECE))
            pieces += data
        return bytes(pieces)
