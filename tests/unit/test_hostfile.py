"""Host files, and the hosts and slots that flags choose among them."""

from __future__ import annotations

import pytest

from s2s_scale.errors import UserError
from s2s_scale.launch.hosts import choose, read_hostfile

HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1]}


def read(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return read_hostfile(path)


def problems(call):
    with pytest.raises(UserError) as caught:
        call()
    return caught.value.problems


def test_hosts_in_the_files_order(tmp_path):
    text = "# our machines\n\nworker-2 slots=2   # the fast one\nworker-1 slots=1\n"
    assert list(read(tmp_path, text).items()) == [("worker-2", [0, 1]), ("worker-1", [0])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n", ":1: host 'a' has no slots; expected a line such as 'worker-1 slots=4'"),
        ("a slots=0\n", ":1: host 'a' has 0 slots"),
        ("b slots=1\na slot=2\n", ":2: host 'a': 'slot=2'"),
        ("a slots=-1\n", ":1: host 'a': 'slots=-1'"),
        ("a slots=2 slots=4\n", ":1: host 'a': slots are given twice"),
        ("a slots=2 gpu\n", ":1: host 'a': 'slots=2 gpu'"),
        ("a slots=2\nb slots=1\na slots=3\n", ":3: host 'a' is given twice (first in line 1)"),
        ("# nothing\n", ": names no host"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, expected):
    (problem,) = problems(lambda: read(tmp_path, text))
    assert f"{tmp_path / 'hosts'}{expected}" in problem


def test_all_mistakes_at_once_and_a_missing_file(tmp_path):
    assert len(problems(lambda: read(tmp_path, "a\nb slots=0\nc slots=1\n"))) == 2
    (problem,) = problems(lambda: read_hostfile(tmp_path / "none"))
    assert "No such file" in problem


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, HOSTS),
        ({"num_nodes": 1}, {"a": [0, 1, 2, 3]}),
        ({"num_processes": 2}, {"a": [0, 1], "b": [0, 1]}),
        ({"include": "b@a:3,1"}, {"b": [0, 1], "a": [3, 1]}),
        ({"exclude": "b@a:0"}, {"a": [1, 2, 3]}),
    ],
)
def test_flags_choose(flags, expected):
    assert choose(HOSTS, **flags) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_nodes": 3}, "--num_nodes 3: the host file names 2 (a, b)"),
        ({"num_processes": 3}, "--num_processes 3: host 'b' has 2 slots"),
        ({"include": "c"}, "--include c: no host 'c'"),
        ({"include": "a:4"}, "host 'a' has no slot 4; expected 0 to 3"),
        ({"include": "a:x"}, "'x'; expected slots such as a:0,2"),
        ({"exclude": "a@b"}, "--exclude a@b: leaves no host"),
        ({"include": "a", "exclude": "b"}, "only one of them can be given"),
        ({"include": "a", "num_nodes": 1}, "--num_nodes: has no effect beside --include"),
    ],
)
def test_what_is_not_there_is_refused(flags, words):
    (problem,) = problems(lambda: choose(HOSTS, **flags))
    assert words in problem
