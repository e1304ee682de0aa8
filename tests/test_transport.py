"""The ends of the socket between a process and its worker."""

import sys
from socket import AF_UNIX, SOCK_STREAM

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")

if sys.platform == "linux":
    from _socket import socketpair

    from polars_async.executors.message import Message
    from polars_async.executors.processes.transport import Transport


@pytest.fixture
def ends():
    both = list(map(Transport, socketpair(AF_UNIX, SOCK_STREAM)))
    yield both
    for each in both:
        each.close()


def test_end_is_open_until_either_is_closed(ends):
    ours, theirs = ends
    assert ours.is_open()
    theirs.close()
    assert not ours.is_open()
    assert not theirs.is_open()  # as `close` of a pool may leave one that is taken all the same


def test_look_takes_nothing_of_what_came(ends):
    ours, theirs = ends
    theirs.send(Message(b"some data", []))
    assert ours.is_open()
    assert ours.receive().data == b"some data"


def test_nothing_in_time_is_no_end(ends):
    ours, theirs = ends
    with pytest.raises(TimeoutError):
        ours.receive(0.001)
    assert ours.is_open()
    theirs.send(Message(b"late", []))
    assert ours.receive(0.001).data == b"late"
    assert ours.is_open()
