"""Hosts are asked over ssh; here a stand-in for ssh runs the question on this machine."""

from __future__ import annotations

import os

import pytest

from s2s_scale.errors import UserError
from s2s_scale.launch import hosts
from s2s_scale.launch.hosts import HostInfo, check_hosts


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ``ssh`` that runs the last word; host ``gone`` cannot be reached, ``bare`` has nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = """#!/bin/bash
host=${@: -2:1}
case $host in
    gone) echo "ssh: connect to host gone: No route to host" >&2; exit 255 ;;
    bare) echo "No module named s2s_scale" >&2; exit 1 ;;
esac
exec bash -c "${@: -1}"
"""
    (folder / "ssh").write_text(script, encoding="utf-8")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_hosts_like_this_one_are_fine_and_the_first_gives_its_address(ssh, tmp_path):
    address = check_hosts(["a", "b"], tmp_path / "new" / "run")
    assert address.count(".") == 3 or ":" in address
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_all_problems_of_all_hosts_at_once(ssh, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "versions", lambda: {"torch": "9.9", "python": "3.99"})
    with pytest.raises(UserError) as caught:
        check_hosts(["gone", "bare", "a"], tmp_path)
    text = "\n".join(caught.value.problems)
    assert "host 'gone': not reachable over ssh without a password" in text
    assert "No route to host" in text
    assert "host 'bare': " in text and "No module named s2s_scale" in text
    assert "host 'a': torch is " in text and "but 9.9 on this host" in text


def test_differences_name_what_was_found_and_expected(tmp_path):
    here = HostInfo(versions={"torch": "2.13"}, code="aa", sees_folder=True)
    there = HostInfo(address="", versions={}, code="bb", sees_folder=False)
    lines = hosts._differences(here, there, tmp_path / "token")
    assert len(lines) == 4
    assert "torch is not installed, but 2.13" in lines[0]
    assert "bb, here aa" in lines[1]
    assert f"does not see the output folder {tmp_path}" in lines[2]
    assert "--master_addr" in lines[3]


def test_a_folder_that_cannot_be_written_to(ssh, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written to"):
        check_hosts(["a"], tmp_path / "file" / "run")
