"""Between this process and a worker: whole messages, and open files with them."""

from __future__ import annotations

from array import array
from contextlib import suppress
from errno import EMFILE
from socket import (
    MSG_CMSG_CLOEXEC,
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
from polars_async.executors.serialization import Message

if TYPE_CHECKING:
    # The class of the interpreter's own: that of the module `socket` is green under gevent.
    from _socket import socket as Socket  # noqa: N812

_HEAD: Final = Struct("!QBB")
_FILES: Final = array("i")
_MOST_ANCILLARY: Final = 4096
_PIECE: Final = 1 << 20


class Transport:
    """One end. Any thread may send; one at a time may receive."""

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
        head = _HEAD.pack(len(message.data), len(message.files), message.shared)
        rights = [(SOL_SOCKET, SCM_RIGHTS, array("i", message.files))] if message.files else []
        try:
            with self._lock:
                sent = self._socket.sendmsg([head, message.data], rights, MSG_NOSIGNAL)
                if sent < len(head) + len(message.data):
                    self._socket.sendall(memoryview(head + message.data)[sent:], MSG_NOSIGNAL)
        except OSError as error:
            raise EOFError from error
        finally:
            message.close()

    def receive(self, timeout: float | None = None) -> Message:
        """
        Wait for a parcel.

        Raises
        ------
        TimeoutError
            Nothing has come for `timeout` seconds; a parcel that begins to come is waited for.
        EOFError
            The other end is gone.
        """
        files: list[int] = []
        try:
            self._socket.settimeout(timeout)
            head, ancillary, _, _ = self._socket.recvmsg(
                _HEAD.size, _MOST_ANCILLARY, MSG_CMSG_CLOEXEC
            )
            for level, kind, data in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    came = array("i", data[: len(data) - len(data) % _FILES.itemsize])
                    files += map(above_standard_files, came)
            if timeout is not None:
                self._socket.settimeout(None)
            head += self._exactly(_HEAD.size - len(head))
            size, number, shared = _HEAD.unpack(head)
            if len(files) < number:
                message = f"{number} files came, and this process may not open as many"
                raise OSError(EMFILE, message)  # noqa: TRY301  # as for any other error
            return Message(self._exactly(size), files, shared)
        except ConnectionError as error:
            Message(b"", files).close()
            raise EOFError from error
        except BaseException:
            Message(b"", files).close()
            raise

    def is_open(self) -> bool:
        """Tell whether the other end is there; nothing may be on its way from it."""
        self._socket.settimeout(0.0)
        try:
            return bool(self._socket.recv(1, MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        """Close this end; the other finds it closed, even where a forked child has a copy."""
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)
        self._socket.close()

    def reset_after_fork(self) -> None:
        """Close the copy of a forked child, which leaves the channel as it is."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        if size == 0:
            return b""
        data = self._socket.recv(min(size, _PIECE))
        if len(data) == size:
            return data
        pieces = bytearray(data)
        while len(pieces) < size:
            if not data:
                raise EOFError
            data = self._socket.recv(min(size - len(pieces), _PIECE))
            pieces += data
        return bytes(pieces)
