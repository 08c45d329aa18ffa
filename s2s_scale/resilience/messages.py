"""JSON messages between the processes of one run, over ``multiprocessing.connection``.

Its framing and its HMAC challenge are used: both ends prove that they know the run's key before
either reads a message. Messages travel as bytes of JSON, so nothing from the network is unpickled.
``Listener`` and ``Client`` themselves do not fit: ``Listener.accept`` authenticates in the thread
that accepts, where one silent stranger would keep every rank waiting, and ``Client`` supports
neither IPv6 nor a connection timeout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import ProcessError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

Message = dict[str, Any]

IDLE_SECONDS = 0.25
LONGEST_MESSAGE = 1 << 20
"""Bytes; a peer that announces a longer message is disconnected."""
STRANGERS = 32
"""How many peers, beyond one per rank, may be connected without having authenticated yet."""
AUTHENTICATION_SECONDS = 5.0
SEND_SECONDS = 1.0
"""How long the server waits for a peer whose receive buffer is full; then it is disconnected."""
CONNECT_SECONDS = 5.0
ATTEMPTS = 3

# What a failed handshake raises: some Python versions check the challenge with ``assert``.
_REFUSED = (EOFError, ProcessError, AssertionError, ValueError)


class MessageServer:
    """Receives messages from any number of authenticated peers and calls hooks with them.

    ``on_message(peer, message)``, ``on_close(peer)`` and ``on_idle()`` (about four times a second)
    all run in one thread, so what they share needs no lock. A message for which ``on_message``
    raises ``LookupError``, ``TypeError``, ``ValueError`` or ``ArithmeticError`` is malformed and
    skipped. ``key`` is what peers must know; ``ranks`` is how many of them may connect at once.
    """

    def __init__(
        self,
        *,
        host: str,
        on_message: Callable[[int, Message], None],
        on_close: Callable[[int], None] = lambda peer: None,
        on_idle: Callable[[], None] = lambda: None,
        ranks: int = 0,
    ) -> None:
        self.key = secrets.token_hex(32)
        self._on_message, self._on_close, self._on_idle = on_message, on_close, on_idle
        self._listener = _listen(host)
        self._listener.settimeout(IDLE_SECONDS)
        self.port = int(self._listener.getsockname()[1])
        self._most_strangers = STRANGERS + ranks
        self._peers: dict[int, _Peer] = {}
        self._strangers: dict[int, _Peer] = {}
        self._inbox: queue.Queue[tuple[int, Message | None]] = queue.Queue(1000)
        self._closing = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name="hub accept", daemon=True)
        self._dispatcher = threading.Thread(target=self._dispatch, name="hub", daemon=True)

    def start(self) -> None:
        self._acceptor.start()
        self._dispatcher.start()

    def send(self, number: int, message: Message) -> None:
        """Send to one peer, if it is still connected. Only to be called from a hook."""
        peer = self._peers.get(number)
        if peer is None or not peer.authenticated or peer.dropped:
            return
        try:
            peer.connection.send_bytes(json.dumps(message).encode())
        except OSError:
            peer.drop()

    def close(self) -> None:
        """Handle what has already arrived, then disconnect all peers. Not to be called in a hook.

        ``on_close`` is not called for the peers that are disconnected here.
        """
        self._closing.set()
        self._acceptor.join(AUTHENTICATION_SECONDS)
        for peer in list(self._peers.values()):
            peer.shut_down(socket.SHUT_RD)
        self._dispatcher.join(AUTHENTICATION_SECONDS)

    def _accept(self) -> None:
        """The accepting thread: one thread per peer, and a bound on peers that are strangers."""
        with self._listener:
            for number in itertools.count():
                if self._closing.is_set():
                    return
                try:
                    peer = _Peer(self._listener.accept()[0])
                except TimeoutError:
                    pass
                except OSError:  # such as too many open files, of which some may be closed soon
                    self._closing.wait(IDLE_SECONDS)
                else:
                    self._peers[number] = self._strangers[number] = peer
                    receiver = threading.Thread(
                        target=self._receive, args=(number, peer), name="hub peer", daemon=True
                    )
                    try:
                        receiver.start()
                    except RuntimeError:  # no more threads
                        self._forget(number)
                now = time.monotonic()
                for oldest, stranger in list(self._strangers.items()):
                    late = now - stranger.connected_at > AUTHENTICATION_SECONDS
                    if late or len(self._strangers) > self._most_strangers:
                        self._strangers.pop(oldest, None)
                        stranger.drop()

    def _receive(self, number: int, peer: _Peer) -> None:
        """The thread of one peer: authenticates it, then passes on what it sends."""
        try:
            with contextlib.suppress(OSError, *_REFUSED):
                deliver_challenge(peer.connection, self.key.encode())
                answer_challenge(peer.connection, self.key.encode())
                peer.authenticated = True
                self._strangers.pop(number, None)
                while True:
                    message = _parse(peer.connection.recv_bytes(LONGEST_MESSAGE))
                    if message is not None:
                        self._inbox.put((number, message))
        finally:
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._strangers.pop(number, None)
        self._inbox.put((number, None))

    def _dispatch(self) -> None:
        """The thread of the hooks. It alone sends and closes connections."""
        next_idle = 0.0
        while self._peers or self._acceptor.is_alive() or not self._closing.is_set():
            try:
                number, message = self._inbox.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                pass
            else:
                if message is None:
                    peer = self._peers.pop(number)
                    peer.close()
                    if peer.authenticated and not self._closing.is_set():
                        self._on_close(number)
                else:
                    with contextlib.suppress(LookupError, TypeError, ValueError, ArithmeticError):
                        self._on_message(number, message)
            if time.monotonic() >= next_idle:
                next_idle = time.monotonic() + IDLE_SECONDS
                self._on_idle()


class _Peer:
    """One connection of the server. ``_socket`` shares its descriptor, for what needs a socket."""

    def __init__(self, connected: socket.socket) -> None:
        _limit(connected, socket.SO_SNDTIMEO, SEND_SECONDS)
        self._socket = connected
        self.connection = Connection(connected.fileno())
        self.connected_at = time.monotonic()
        self.authenticated = False
        self.dropped = False

    def drop(self) -> None:
        """Disconnect it: its thread ends, and then its connection is closed. From any thread."""
        self.dropped = True
        self.shut_down(socket.SHUT_RDWR)

    def shut_down(self, how: int) -> None:
        """As ``socket.shutdown``; what has already arrived can still be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.detach()
        self.connection.close()


class MessageClient:
    """An authenticated connection to a ``MessageServer``.

    Raises:
        OSError: the server cannot be reached or has another key, from construction; the connection
            is lost, from ``send`` and ``receive``.
    """

    def __init__(self, host: str, port: int, key: str) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._connection = _connect(host, port, key.encode())
                return
            except ConnectionError:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(0.5)

    def fileno(self) -> int:
        """The descriptor to wait on, as by ``selectors``."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if none arrives within ``seconds``."""
        try:
            if self._connection.poll(seconds):
                return _parse(self._connection.recv_bytes(LONGEST_MESSAGE))
        except EOFError as error:
            raise ConnectionResetError("closed by the other side") from error
        return None

    def close(self) -> None:
        self._connection.close()


def _connect(host: str, port: int, key: bytes) -> Connection[Any, Any]:
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connected:
        connected.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            _limit(connected, option, CONNECT_SECONDS)
        connection = Connection(connected.detach())
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except _REFUSED as error:
        connection.close()
        raise ConnectionRefusedError("the other side has another key or is overloaded") from error
    except OSError:
        connection.close()
        raise
    return connection


def _limit(connected: socket.socket, option: int, seconds: float) -> None:
    """Let the system's own reads or writes fail after ``seconds``: a connection knows no limit."""
    whole = int(seconds)
    timeval = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, option, timeval)


def _listen(host: str) -> socket.socket:
    """A listening socket on a free port: on the loopback interface if ``host`` is there, else all.

    The address family is that of ``host``, because the others connect to that name.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    local = str(address[0]).startswith("127.") or address[0] == "::1"
    return socket.create_server((address[0] if local else "", 0), family=family, backlog=1024)


def _parse(data: bytes) -> Message | None:
    """The JSON object in a message; None for anything else."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
