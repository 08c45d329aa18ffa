"""JSON lines over TCP between the processes of one run, for failure reports and the watchdog.

A connection begins with the run's token: whatever else finds the port is dropped unread.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

IDLE_SECONDS = 0.25
LONGEST_LINE = 1 << 20
CONNECT_SECONDS = 5.0


class MessageServer:
    """Takes lines from any number of peers, in a thread of its own that also calls the hooks.

    ``on_line(peer, message)``, ``on_close(peer)`` and ``on_idle()`` (about four times a second) all
    run in that thread, so that what they share needs no lock.
    """

    def __init__(
        self,
        *,
        host: str,
        on_line: Callable[[int, Message], None],
        on_close: Callable[[int], None] = lambda peer: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.token = secrets.token_hex(16)
        self._on_line, self._on_close, self._on_idle = on_line, on_close, on_idle
        self._listener = _listen(host)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="s2s-scale lines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def broadcast(self, message: Message) -> None:
        """Send to every peer that has shown the token; one that takes nothing is passed over."""
        for peer in list(self._peers.values()):
            if peer.trusted:
                _send_at_once(peer.connection, message)

    def answer(self, peer: int, message: Message) -> None:
        """Send to one peer."""
        if peer in self._peers:
            _send_at_once(self._peers[peer].connection, message)

    def close(self) -> None:
        """Read what has arrived, then drop all connections. Not to be called from a hook."""
        self._ending.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._serve(IDLE_SECONDS)
                self._on_idle()
            self._serve(0)
        finally:
            for peer in self._peers.values():
                peer.connection.close()
            self._listener.close()
            self._selector.close()

    def _serve(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.fd)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._peers[connection.fileno()] = _Peer(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, number: int) -> None:
        peer = self._peers[number]
        try:
            data = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.buffer += data
        *whole, peer.buffer = peer.buffer.split(b"\n")
        for line in whole:
            if not peer.trusted:
                peer.trusted = secrets.compare_digest(line, self.token.encode())
                data = data if peer.trusted else b""
            if not peer.trusted:
                break
            message = _parsed(line)
            if message is not None:
                self._on_line(number, message)
        if not data or len(peer.buffer) > LONGEST_LINE:
            self._drop(number)

    def _drop(self, number: int) -> None:
        peer = self._peers.pop(number)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.trusted:
            self._on_close(number)


class _Peer:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.trusted = False


class LineClient:
    """One connection to a ``MessageServer``; ``connection`` is its socket.

    Raises:
        OSError: the server cannot be reached, from construction and ``send``.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        self.connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        self.connection.sendall(token.encode() + b"\n")
        self._buffer = b""

    def send(self, message: Message) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> list[Message]:
        """The messages that arrive within ``seconds``; returns as soon as there is one.

        Raises:
            ConnectionError: the server has closed the connection.
        """
        self.connection.settimeout(max(seconds, 0.001))
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        finally:
            self.connection.settimeout(CONNECT_SECONDS)
        if not data:
            raise ConnectionResetError("closed by the other side")
        self._buffer += data
        *whole, self._buffer = self._buffer.split(b"\n")
        return [message for line in whole if (message := _parsed(line)) is not None]

    def close(self) -> None:
        self.connection.close()


def _listen(host: str) -> socket.socket:
    """A listening socket on a free port: the loopback interface where ``host`` is there, else all.

    The address family is that of ``host``, because the others will connect to that name.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    local = str(address[0]).startswith("127.") or address[0] == "::1"
    return socket.create_server((address[0] if local else "", 0), family=family, backlog=1024)


def _send_at_once(connection: socket.socket, message: Message) -> None:
    with contextlib.suppress(OSError):
        connection.send(json.dumps(message).encode() + b"\n")


def _parsed(line: bytes) -> Message | None:
    """The message in a line; None for anything that is not one."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
