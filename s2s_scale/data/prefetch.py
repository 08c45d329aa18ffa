"""Make items in a thread that is ahead of their use."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")
BATCHES_AHEAD = 4
STOP_SECONDS = 10.0

_unfinished: dict[threading.Thread, threading.Event] = {}


@atexit.register
def _stop_all() -> None:
    """End the threads whose items nobody reads any more, as after an error that ends the program.

    Python would end them wherever they stand, and inside torch that aborts the process.
    """
    threads = list(_unfinished.items())
    for _, stopped in threads:
        stopped.set()
    for thread, _ in threads:
        thread.join(STOP_SECONDS)


def ahead(items: Iterator[T], *, count: int = BATCHES_AHEAD) -> Iterator[T]:
    """The same items, made in a thread that is up to ``count`` of them ahead."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=count)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001  (raised again where the items are read)
            put((False, error))
        finally:
            _unfinished.pop(threading.current_thread(), None)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    _unfinished[thread] = stopped
    thread.start()
    try:
        while True:
            there, item = made.get()
            if not there:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()
