"""Make items in a thread that is ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")
BATCHES_AHEAD = 4


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

    threading.Thread(target=work, daemon=True, name="batches").start()
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
