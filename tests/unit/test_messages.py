"""The run's server among strangers: silent ones, noisy ones, and ranks that send nonsense."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from s2s_scale.resilience import messages
from s2s_scale.resilience.messages import MessageClient, MessageServer


class Echo:
    """A server that answers each message with it, and notes what it got and who left."""

    def __init__(self, host="127.0.0.1", ranks=0):
        self.host = host
        self.got, self.left = [], []
        self.server = MessageServer(
            host=host, on_message=self.receive, on_close=self.left.append, ranks=ranks
        )

    def receive(self, peer, message):
        self.got.append(message["n"])
        self.server.send(peer, message)

    def connect(self, key=None):
        return MessageClient(self.host, self.server.port, key or self.server.key)

    def stranger(self):
        return socket.create_connection((self.host, self.server.port))


@pytest.fixture
def echo():
    made = Echo()
    made.server.start()
    yield made
    made.server.close()
    assert not made.server._dispatcher.is_alive() and not made.server._acceptor.is_alive()


def is_served(echo, *, within=5.0):
    """Whether a rank that connects now gets its answer in time."""
    began = time.monotonic()
    client = echo.connect()
    client.send({"n": 1})
    answer = client.receive(within)
    client.close()
    return answer == {"n": 1} and time.monotonic() - began < within


def closes(connection, *, within):
    """Whether the server closes a connection; what it sends until then is passed over."""
    connection.settimeout(within)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_messages_in_order_and_the_end_of_a_connection(echo):
    client = echo.connect()
    for n in range(100):
        client.send({"n": n})
    assert [client.receive(5)["n"] for _ in range(100)] == list(range(100)) == echo.got
    assert client.receive(0) is None and echo.left == []
    client.close()
    assert until(lambda: len(echo.left) == 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_both_families_of_addresses(host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    made = Echo(host)
    made.server.start()
    assert is_served(made)
    made.server.close()


def test_two_hundred_silent_strangers_keep_nobody_waiting_and_are_disconnected(echo):
    idle = [echo.stranger() for _ in range(200)]
    assert is_served(echo)
    assert until(lambda: len(echo.server._peers) <= messages.STRANGERS)
    began = time.monotonic()
    assert all(closes(connection, within=10) for connection in idle)
    assert time.monotonic() - began < messages.AUTHENTICATION_SECONDS + 3
    assert len(echo.left) == 1, "strangers are not mentioned"
    assert until(lambda: not echo.server._peers)


def test_a_stranger_that_sends_byte_by_byte_is_disconnected(echo, monkeypatch):
    monkeypatch.setattr(messages, "AUTHENTICATION_SECONDS", 0.5)
    with echo.stranger() as slow:
        slow.sendall(struct.pack("!i", 200))
        for _ in range(10):
            time.sleep(0.2)
            try:
                slow.sendall(b"x")
            except OSError:
                break
        assert closes(slow, within=3)
    assert is_served(echo)


@pytest.mark.parametrize("key", ["guess", "0" * 64])
def test_without_the_key_nothing_is_read(echo, monkeypatch, key):
    monkeypatch.setattr(messages, "ATTEMPTS", 1)
    with pytest.raises(ConnectionRefusedError, match="another key"):
        echo.connect(key)
    assert echo.got == [] and is_served(echo)


JUNK = {
    "1 MB": b"GET / HTTP/1.1\r\n" * 65536,
    "a length of 2 GB": struct.pack("!i", 0x7FFFFFFF) + bytes(1000),
    "a length of 16 EB": struct.pack("!iQ", -1, 0xFFFFFFFFFFFFFFFF),
    "a negative length": struct.pack("!i", -5),
    "an empty message": struct.pack("!i", 0),
    "a challenge of its own": struct.pack("!i", 31) + b"#CHALLENGE#" + bytes(20),
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_is_disconnected(echo, what):
    with echo.stranger() as noisy:
        try:
            noisy.sendall(JUNK[what])
            noisy.shutdown(socket.SHUT_WR)
        except OSError:  # disconnected already
            pass
        assert closes(noisy, within=5)
    assert echo.got == [] and echo.left == [] and is_served(echo)


NONSENSE = (
    b"",
    b"\xff\xfe",
    b"{",
    b"[" * 100_000,
    b'{"n":' * 50_000,
    b'{"n": ' + b"1" * 10_000 + b"}",
    b"[1]",
    b"null",
    b"{}",
    b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
)


@pytest.mark.parametrize("data", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_of_a_rank_is_skipped_and_the_connection_stays(echo, data):
    client = echo.connect()
    client._connection.send_bytes(data)
    client.send({"n": 7})
    assert client.receive(5) == {"n": 7} and echo.got == [7]
    client.close()


def test_a_message_that_is_too_long_ends_its_connection_only(echo):
    client = echo.connect()
    with contextlib.suppress(OSError):  # noticed here, or only by the next call
        client.send({"n": "x" * (messages.LONGEST_MESSAGE + 1)})
    with pytest.raises(OSError):
        client.receive(5)
    assert is_served(echo)


def test_a_rank_that_reads_nothing_is_disconnected(echo, monkeypatch):
    monkeypatch.setattr(messages, "SEND_SECONDS", 0.2)
    deaf = echo.connect()
    text = "x" * 100_000

    def talk():
        try:
            for _ in range(1000):
                deaf.send({"n": text})
        except OSError:
            pass

    threading.Thread(target=talk, daemon=True).start()
    assert until(lambda: echo.left, 20)
    assert is_served(echo)


EXHAUSTED = """
import os, resource, sys, time
from s2s_scale.resilience.hub import Hub
with Hub() as hub:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    print(*hub.location, len(taken), flush=True)
    sys.stdin.readline()
    for number in taken:
        os.close(number)
    while not hub.done_ranks:
        time.sleep(0.05)
"""


def test_a_hub_without_file_descriptors_goes_on_when_there_are_some():
    with subprocess.Popen(
        [sys.executable, "-c", EXHAUSTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        host, port, key, taken = process.stdout.readline().split()
        assert int(taken) > 20
        # The system accepts connections that the process itself cannot.
        strangers = [socket.create_connection((host, int(port))) for _ in range(10)]
        time.sleep(1)
        assert process.poll() is None
        process.stdin.write("go on\n")
        process.stdin.flush()
        client = MessageClient(host, int(port), key)
        client.send({"kind": "done", "rank": 0, "code": 0})
        assert process.wait(20) == 0
        for stranger in strangers:
            stranger.close()


def test_a_server_without_threads_goes_on_when_there_are_some(echo, monkeypatch):
    start = threading.Thread.start

    def none_left(thread):
        if thread.name == "hub peer":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with echo.stranger() as refused:
            assert closes(refused, within=5)
    assert is_served(echo)


def test_what_has_arrived_is_read_before_the_end():
    made = Echo()
    made.server.start()
    client = made.connect()
    for n in range(50):
        client.send({"n": n})
    made.server.close()
    assert made.got == list(range(50)) and made.left == []


def test_a_server_that_answers_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(messages, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(OSError):
            MessageClient("127.0.0.1", silent.getsockname()[1], "key")
        assert time.monotonic() - began < 5
