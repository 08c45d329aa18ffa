"""Writes a checkpoint in a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from s2s_scale.errors import UserError


class BackgroundSave:
    """One save at a time. The process does not end before it is done."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Run ``save`` in a thread; the one before must have been taken note of."""
        assert self._thread is None, "finished() or wait() comes first"

        def run() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001  (handed over by ``result``)
                self._error = error

        self._thread = threading.Thread(target=run, name="saving a checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written; errors stay for ``result``."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> BaseException | None:
        """The error of the save that has ended, None where it went well; then a new one may start.

        It does not wait: call it when nothing is ``running``.
        """
        error, self._error, self._thread = self._error, None, None
        return error


def problems_of(error: BaseException | None) -> tuple[str, ...]:
    """What other ranks are told of an error."""
    if error is None:
        return ()
    if isinstance(error, UserError):
        return error.problems
    return (f"saving in the background failed on rank 0: {type(error).__name__}: {error}",)
