"""Two hosts: the numbers of one, and a fault on either ends the run with the rank's name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2s_scale.models.create import new_model
from tests.support.command import run_command
from tests.support.copying import write_copy_task
from tests.support.faults import MESSAGE, RAISE, faulty_path
from tests.support.hosts import INTERFACE, missing, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"two hosts: {missing()}"),
]
COMMON = """--per_device_train_batch_size 8 --learning_rate 1e-3 --logging_steps 1 --disable_tqdm
    --report_to none --dropout 0 --seed 0""".split()
SHORT = [*COMMON, "--max_steps", "6", "--save_strategy", "no"]
ENDLESS = [*COMMON, *"--max_steps 100000 --save_steps 5 --save_total_limit 1".split()]
SECONDS_TO_END = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_copy_task(tmp_path_factory.mktemp("data") / "data", {"train": 96})


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    texts = (data / "train.source").read_text(encoding="utf-8").splitlines()
    folder = tmp_path_factory.mktemp("model") / "new"
    return new_model(
        architecture="bart", size="tiny", texts=texts, vocab_size=300, output_dir=folder
    )


@pytest.fixture
def hosts(tmp_path):
    (tmp_path / "net").mkdir()
    with two_hosts(tmp_path / "net") as made:
        yield made


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def start(hosts, words, *, host=0, log, **more):
    """Start a command on a host, with ``more`` variables; its output goes to ``log``."""
    environment = {**os.environ, **hosts.environment, "OMP_NUM_THREADS": "1", **more}
    environment["GLOO_SOCKET_IFNAME"] = INTERFACE
    with log.open("wb") as out:
        return subprocess.Popen(
            hosts.both[host].command([sys.executable, *words]),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def zero2(model, data, output, hosts, profile, *more):
    words = ["-m", "s2s_scale", "train", "--profile", profile, "--hostfile", hosts.hostfile]
    return [*words, "--model", model, "--data_dir", data, "--output_dir", output, *more]


@pytest.fixture
def profile(tmp_path):
    """cpu-zero2 as a user with several interfaces writes it."""
    path = tmp_path / "two-hosts.yaml"
    text = f"extends: cpu-zero2\nenvironment: {{GLOO_SOCKET_IFNAME: {INTERFACE}}}\n"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_host(model, data, tmp_path_factory):
    """The losses of one process with as many rows per step."""
    output = tmp_path_factory.mktemp("one") / "run"
    outcome = run_command(
        "train", "--model", model, "--data_dir", data, "--output_dir", output, *SHORT,
        "--profile", "cpu", "--bf16", "false", "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = losses(output)
    assert len(found) == 6
    return found


def test_zero2_from_a_host_file_has_the_losses_of_one_host(
    hosts, profile, model, data, one_host, tmp_path
):
    log = tmp_path / "log"
    words = zero2(model, data, tmp_path / "two", hosts, profile, *SHORT)
    assert start(hosts, words, log=log).wait(180) == 0, log.read_text(encoding="utf-8")
    assert losses(tmp_path / "two") == pytest.approx(one_host, rel=1e-5)


def test_the_deepspeed_command_typed_with_a_host_file(
    hosts, profile, model, data, one_host, tmp_path
):
    log = tmp_path / "log"
    words = ["-m", "deepspeed.launcher.runner", "--hostfile", hosts.hostfile]
    words += ["--master_addr", hosts.both[0].address, "--module", "s2s_scale", "train"]
    words += ["--profile", profile, "--model", model, "--data_dir", data]
    words += ["--output_dir", tmp_path / "two", *SHORT]
    (tmp_path / "environment").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\n", encoding="utf-8")
    process = start(hosts, words, log=log, DS_ENV_FILE=str(tmp_path / "environment"))
    assert process.wait(180) == 0, log.read_text(encoding="utf-8")
    assert losses(tmp_path / "two") == pytest.approx(one_host, rel=1e-5)


def test_torchrun_on_each_host_has_the_losses_of_one_host(hosts, model, data, one_host, tmp_path):
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    running = []
    for number, log in enumerate(logs):
        words = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"]
        words += ["--nproc-per-node=1", f"--master-addr={hosts.both[0].address}"]
        words += ["--master-port=29500", "-m", "s2s_scale", "train", "--profile", "cpu-ddp"]
        words += ["--model", model, "--data_dir", data, "--output_dir", tmp_path / "two", *SHORT]
        running.append(start(hosts, words, host=number, log=log))
    for process, log in zip(running, logs, strict=True):
        assert process.wait(180) == 0, log.read_text(encoding="utf-8")
    assert losses(tmp_path / "two") == pytest.approx(one_host, rel=1e-5)


@pytest.mark.parametrize("fault", ["killed", "raising"])
def test_a_fault_ends_the_run_and_names_the_rank(
    hosts, profile, model, data, tmp_path, monkeypatch, fault
):
    log = tmp_path / "log"
    output = tmp_path / "two"
    monkeypatch.setenv("PYTHONPATH", faulty_path(tmp_path / "faults"))
    process = start(hosts, zero2(model, data, output, hosts, profile, *ENDLESS), log=log)
    wait_for_checkpoint(output, process, log)
    began = time.monotonic()
    os.kill(rank_on(hosts.both[1]), signal.SIGKILL if fault == "killed" else RAISE)
    code = process.wait(SECONDS_TO_END + 30)
    seconds = time.monotonic() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    assert code != 0, text
    assert seconds < SECONDS_TO_END, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    print(f"{fault}: exit code {code} after {seconds:.0f} s: {errors[0]}")
    assert errors[0].startswith("error: rank 1 on "), text
    assert (MESSAGE in errors[0]) == (fault == "raising")


FAULT_SECONDS = 60
LONGER = [*COMMON, *"--max_steps 60 --save_steps 5 --save_total_limit 2".split()]


def test_a_cut_cable_is_a_restart_once_it_is_back(hosts, profile, model, data, tmp_path):
    log, output = tmp_path / "log", tmp_path / "two"
    words = zero2(model, data, output, hosts, profile, *LONGER, "--max_restarts", 1)
    process = start(hosts, [*words, "--fault_timeout_seconds", FAULT_SECONDS], log=log)
    wait_for_checkpoint(output, process, log)
    began = time.monotonic()
    hosts.both[1].cut_off()
    wait_for_text(log, "started again from the newest checkpoint", process)
    seconds = time.monotonic() - began
    hosts.both[1].connect()
    assert process.wait(180) == 0, log.read_text(encoding="utf-8")
    print(f"cut in a step: all had ended after {seconds:.0f} s")
    assert seconds < FAULT_SECONDS
    whole = run_command(
        "train", "--model", model, "--data_dir", data, "--output_dir", tmp_path / "one", *LONGER,
        "--profile", "cpu", "--bf16", "false", "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    assert whole.code == 0, whole.err
    assert len(losses(output)) == 60
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def wait_for_text(log, text, process):
    deadline = time.monotonic() + 120
    while text not in log.read_text(encoding="utf-8", errors="replace"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def wait_for_checkpoint(output, process, log):
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def rank_on(host) -> int:
    """Process id of the one rank that runs on a host."""
    pids = subprocess.run(
        ["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True
    ).stdout.split()
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if command[2:4] == [b"-m", b"s2s_scale"]:
            return int(pid)
    raise AssertionError(f"no rank runs on {host.name}")


def test_what_is_wrong_with_the_hosts_is_said_before_anything_starts(
    hosts, profile, model, data, tmp_path
):
    hosts.hostfile.write_text("10.77.0.9 slots=1\n10.77.0.2 slots=1\n", encoding="utf-8")
    log = tmp_path / "log"
    words = zero2(model, data, tmp_path / "two", hosts, profile, *SHORT)
    assert start(hosts, words, log=log).wait(60) == 2
    errors = log.read_text(encoding="utf-8").splitlines()
    assert len(errors) == 1 and "host '10.77.0.9': not reachable over ssh" in errors[0], errors
