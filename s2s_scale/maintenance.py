"""Notices of Google's cloud that this host will be taken away: maintenance, and preemption.

The metadata server of a VM is asked by one process of the host, in a thread. ``GCE_METADATA_HOST``
names another server, as it does for Google's own libraries.
"""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable

SERVER = "metadata.google.internal"
VARIABLE = "GCE_METADATA_HOST"
EVERY_SECONDS = 5.0
ANSWER_SECONDS = 2.0
PATHS = ("maintenance-event", "preempted")
NOTHING = ("NONE", "FALSE", "")


class MaintenanceWatch:
    """Asks until there is a notice or it is stopped; ``tell`` gets the notice, once."""

    def __init__(
        self, tell: Callable[[str], None], *, every_seconds: float = EVERY_SECONDS
    ) -> None:
        self._tell = tell
        self._every = every_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="maintenance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more questions; does not wait for an answer that is due."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._every):
            found = notice()
            if found is not None:
                self._tell(found)
                return


def notice() -> str | None:
    """What the metadata server has to say, such as 'preempted=TRUE'; None for nothing.

    A server that cannot be reached has nothing to say: this host is none of Google's.
    """
    for path in PATHS:
        value = _ask(path)
        if value is not None and value.upper() not in NOTHING:
            return f"{path}={value}"
    return None


def _ask(path: str) -> str | None:
    """The value of an attribute of this VM; None where there is no answer in time."""
    host = os.environ.get(VARIABLE) or SERVER
    connection = http.client.HTTPConnection(host, timeout=ANSWER_SECONDS)
    try:
        # No proxy is asked, whatever the environment says: the server is on this very host.
        connection.request(
            "GET",
            f"/computeMetadata/v1/instance/{path}",
            headers={"Metadata-Flavor": "Google"},
        )
        answer = connection.getresponse()
        text = answer.read(1000).decode("utf-8", "replace").strip()
        return text if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
