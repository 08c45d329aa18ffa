"""Google Cloud's notices that this VM is about to be taken away: host maintenance and preemption.

One process of the host asks the VM's metadata server, in a thread. ``GCE_METADATA_HOST`` names
another server, as it does for Google's own libraries.
"""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable

SERVER = "metadata.google.internal"
SERVER_VARIABLE = "GCE_METADATA_HOST"
POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0
ATTRIBUTES = ("maintenance-event", "preempted")
NO_NOTICE = ("NONE", "FALSE", "")


class MaintenanceWatcher:
    """Polls until there is a notice or it is stopped; ``on_notice`` is called with it, once."""

    def __init__(
        self, on_notice: Callable[[str], None], *, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._on_notice = on_notice
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gcp maintenance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop polling; does not wait for an answer that is still due."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            notice = read_notice()
            if notice is not None:
                self._on_notice(notice)
                return


def read_notice() -> str | None:
    """The metadata server's notice, such as 'preempted=TRUE'; None if there is none.

    A server that cannot be reached has no notice: this host is not one of Google's.
    """
    host = os.environ.get(SERVER_VARIABLE) or SERVER
    for attribute in ATTRIBUTES:
        # No proxy is asked, whatever the environment says: the server is on this very host.
        connection = http.client.HTTPConnection(host, timeout=ANSWER_SECONDS)
        try:
            connection.request(
                "GET",
                f"/computeMetadata/v1/instance/{attribute}",
                headers={"Metadata-Flavor": "Google"},
            )
            answer = connection.getresponse()
            value = answer.read(1000).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
        if answer.status == http.HTTPStatus.OK and value.upper() not in NO_NOTICE:
            return f"{attribute}={value}"
    return None
