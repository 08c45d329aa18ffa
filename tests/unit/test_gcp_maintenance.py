"""Notices of a metadata server: a false one that says what the test wants."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s2s_scale.resilience.gcp_maintenance import (
    SERVER_VARIABLE,
    MaintenanceWatcher,
    read_notice,
)
from s2s_scale.resilience.preemption import Stopped, handle_preemption


@pytest.fixture
def metadata(monkeypatch):
    """Path -> what the server answers; it takes no question without Google's header."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = name in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(values.get(name, "").encode() + b"\n")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(SERVER_VARIABLE, f"127.0.0.1:{server.server_port}")
    yield values
    server.shutdown()
    server.server_close()


def test_nothing_is_to_come(metadata):
    assert read_notice() is None


@pytest.mark.parametrize(
    ("path", "value"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_is_told(metadata, path, value):
    metadata[path] = value
    assert read_notice() == f"{path}={value}"


def test_a_host_without_such_a_server_has_no_notices(monkeypatch):
    monkeypatch.setenv(SERVER_VARIABLE, "127.0.0.1:9")
    assert read_notice() is None


def test_a_notice_asks_the_process_to_stop(metadata):
    def work():
        with handle_preemption(60) as guard:
            MaintenanceWatcher(guard.ask, poll_seconds=0.01).start()
            metadata["preempted"] = "TRUE"
            threading.Event().wait(20)

    with pytest.raises(Stopped, match="stopped by preempted=TRUE"):
        work()


def test_a_notice_during_training_is_kept_for_the_end_of_the_step(metadata):
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    with handle_preemption(60) as guard:
        guard.at_boundaries = True
        watch = MaintenanceWatcher(guard.ask, poll_seconds=0.01)
        watch.start()
        for _ in range(1000):
            if guard.reason:
                break
            threading.Event().wait(0.01)
        assert guard.reason == "maintenance-event=MIGRATE_ON_HOST_MAINTENANCE"
