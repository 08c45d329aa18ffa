"""Bad profiles, hosts and launch flags: refused by the command before anything is started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from s2s_scale import cli
from s2s_scale.launch import spec
from s2s_scale.settings import profiles
from tests.support.command import Here, Outcome, finish, refused, run_command, start_command


@pytest.fixture
def training(here: Here, model: Path, data: Path, tmp_path: Path, monkeypatch):
    """Call ``train`` under a profile; fails if it starts anything or makes the output folder."""

    def started(*_: object, **__: object) -> int:
        raise AssertionError("a launcher was started")

    monkeypatch.setattr("s2s_scale.resilience.supervisor.start", started)

    def train(*words: object) -> Outcome:
        files = ("--model_name_or_path", model, "--data_dir", data)
        outcome = here("train", *files, "--output_dir", tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()
        return outcome

    return train


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """Two CUDA devices, as far as a command that starts nothing can tell."""
    monkeypatch.setattr(profiles, "cuda_is_here", lambda: True)
    monkeypatch.setattr(spec, "cuda_devices", lambda environ: ["0", "1"])


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "hosts"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ---- Profiles ----


@pytest.mark.parametrize("profile", ["gpu", "gpu-ddp", "gpu-zero3"])
def test_a_profile_for_a_device_that_is_not_there(training, monkeypatch, profile):
    monkeypatch.setattr(profiles, "cuda_is_here", lambda: False)
    outcome = training("--profile", profile)
    refused(outcome, f"profile '{profile}': is for device cuda", "no usable CUDA", "--profile cpu")


@pytest.mark.parametrize(
    ("profile", "package", "extra"),
    [("cpu-oss", "fairscale", "oss"), ("cpu-zero2", "deepspeed", "deepspeed")],
)
def test_a_backend_whose_package_is_missing(training, monkeypatch, profile, package, extra):
    find = profiles.importlib.machinery.PathFinder.find_spec

    def without(name: str, *rest: object) -> object:
        return None if name == package else find(name, *rest)

    monkeypatch.setattr(profiles.importlib.machinery.PathFinder, "find_spec", without)
    outcome = training("--profile", profile)
    refused(
        outcome,
        f"profile '{profile}': the package {package} is not installed",
        f"pip install 's2s-scale[{extra}]', or pip install {package}",
    )


def test_an_impossible_pair_in_a_profile(training, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("extends: cpu-oss\ndeepspeed_config: zero2\n", encoding="utf-8")
    outcome = training("--profile", path)
    refused(outcome, f"{path}:2: deepspeed_config", "no effect with backend fairscale_oss")


# ---- DeepSpeed's configuration ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{"zero_optimization": {"stage": 4}}',
            ["config.json: zero_optimization.stage", "expected 0, 1, 2 or 3, got 4"],
        ),
        ('{"a": 1,\n "b": }', ["config.json:2:7: not valid JSON", "correct it there"]),
        ('{"a": 1, "a": 2}', ["'a' is given twice"]),
        ("[1]", ["expected a JSON object"]),
        (
            '{"gradient_clipping": 3}',
            ["gradient_clipping is 3, but --max_grad_norm is 1.0", '"auto"', "change the flag"],
        ),
    ],
)
def test_a_bad_deepspeed_configuration(training, tmp_path, text, parts):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    outcome = training("--profile", "cpu-zero2", "--deepspeed", tmp_path / "config.json")
    refused(outcome, *parts)


def test_every_contradiction_between_configuration_and_flags_is_listed(training, tmp_path):
    config = {
        "gradient_clipping": 3,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ("--deepspeed", tmp_path / "config.json", "--max_grad_norm", 0.5)
    outcome = training("--profile", "cpu-zero2", *words)
    refused(outcome, "gradient_clipping is 3, but --max_grad_norm is 0.5")
    refused(outcome, "bf16.enabled is True, but --bf16 is False")
    refused(outcome, "train_micro_batch_size_per_gpu is 4, but --per_device_train_batch_size is 8")
    assert len(outcome.errors) == 3


def test_a_configuration_that_is_not_there(training):
    refused(training("--profile", "cpu-zero2", "--deepspeed", "zero9"), "'zero9'", "zero3")
    refused(training("--profile", "cpu-zero2", "--deepspeed", "no/x.json"), "does not exist")


def test_a_configuration_for_another_backend(training):
    outcome = training("--profile", "cpu-ddp", "--deepspeed", "zero2")
    refused(outcome, "--deepspeed zero2", "has no effect", "cpu-zero2 or gpu-zero2")


def test_adafactor_under_zero(training):
    outcome = training("--profile", "cpu-zero2", "--optim=adafactor")
    refused(outcome, "ZeRO 2 keeps flat pieces", "--optim adamw_torch", "cpu-oss")


# ---- Hosts ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("worker-1 slots=0\n", [":1: host 'worker-1' has 0 slots", "expected at least 1"]),
        ("# nobody\n", ["names no host", "expected lines such as"]),
    ],
)
def test_a_bad_host_file(training, hostfile, text, parts):
    path = hostfile(text)
    refused(training("--profile", "cpu-zero2", "--hostfile", path), str(path), *parts)


def test_a_host_file_that_is_not_there(training):
    outcome = training("--profile", "cpu-zero2", "--hostfile", "nowhere")
    refused(outcome, "--hostfile nowhere: No such file", "expected lines such as")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--num_nodes", 3), ["--num_nodes 3: the host file names 2 (worker-1, worker-2)"]),
        (("--include", "worker-3"), ["no host 'worker-3'", "worker-1, worker-2"]),
    ],
)
def test_hosts_and_slots_that_the_host_file_does_not_name(training, hostfile, flags, parts):
    path = hostfile("worker-1 slots=1\nworker-2 slots=1\n")
    refused(training("--profile", "cpu-zero2", "--hostfile", path, *flags), *parts)


def test_hosts_that_cannot_be_reached_are_named_all_at_once(
    here, model, data, hostfile, tmp_path, monkeypatch
):
    """By an ssh that reaches nobody; tests/multinode has real hosts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 255\n")
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    path = hostfile("worker-1 slots=1\nworker-2 slots=1\n")
    outcome = here(
        *("train", "--model", model, "--data_dir", data, "--output_dir", tmp_path / "run"),
        *("--profile", "cpu-zero2", "--hostfile", path),
    )
    refused(outcome, "host 'worker-1': not reachable over ssh", "no route to host", "ssh worker-1")
    refused(outcome, "host 'worker-2': not reachable over ssh")
    assert len(outcome.errors) == 2


# ---- Processes and ports ----


def test_more_processes_than_devices(training, two_gpus):
    for profile in ("gpu-ddp", "gpu-zero2"):
        outcome = training("--profile", profile, "--num_processes", 3)
        refused(outcome, "3 processes, but 2 CUDA device(s)", "--num_processes 2")


def test_several_processes_under_a_profile_without_a_launcher(training):
    outcome = training("--profile", "cpu", "--num_processes", 2)
    refused(outcome, "--num_processes 2", "profile 'cpu' starts one process", "cpu-ddp")


@pytest.mark.parametrize(
    ("profile", "flags", "parts"),
    [
        ("cpu", ("--num_nodes", 2), ["--num_nodes: has no effect with profile 'cpu'"]),
        ("cpu-zero2", ("--num_nodes", 2), ["--num_nodes: has no effect without --hostfile"]),
        ("cpu-ddp", ("--num_nodes", 2), ["also needs --node_rank and --master_addr"]),
        ("cpu-ddp", ("--include", "a"), ["--include: has no effect", "launcher torchrun"]),
        ("cpu-zero2", ("--master_port", 99999), ["expected a port from 1 to 65535, got 99999"]),
        ("cpu-zero2", ("--num_processes", 0), ["--num_processes", "at least 1, got 0"]),
        ("cpu-zero2", ("--launcher_runner", "pdhs"), ["did you mean 'pdsh'"]),
        ("cpu-zero2", ("--include", "localhost:7"), ["host 'localhost' has no slot 7"]),
    ],
)
def test_launch_flags_that_cannot_be(training, profile, flags, parts):
    refused(training("--profile", profile, *flags), *parts)


@pytest.mark.parametrize("profile", ["cpu-ddp", "cpu-zero2"])
def test_a_port_in_use_is_replaced_and_said(here, model, data, tmp_path, profile):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("--profile", profile, "--master_port", port, "--dry_run")
        files = ("--model", model, "--data_dir", data, "--output_dir", tmp_path / "run")
        outcome = here("train", *files, *words)
    assert outcome.code == 0, outcome.err
    note = next(line for line in outcome.out.splitlines() if line.startswith("note: "))
    assert f"--master_port {port}: is in use; port " in note and "used instead" in note
    chosen = note.split("port ")[-1].split()[0]
    before_our_words = outcome.out.splitlines()[1].partition(" train ")[0]
    assert chosen in before_our_words and str(port) not in before_our_words


# ---- A launcher's variables ----


@pytest.mark.parametrize("profile", ["cpu", "cpu-ddp", "cpu-oss", "cpu-zero2"])
def test_rank_without_world_size(here, model, data, tmp_path, monkeypatch, profile):
    monkeypatch.setenv("RANK", "0")
    files = ("--model", model, "--data_dir", data, "--output_dir", tmp_path / "run")
    outcome = here("train", *files, "--profile", profile)
    refused(outcome, "RANK=0 set, but", "WORLD_SIZE", "unset them")
    assert not (tmp_path / "run").exists()


# ---- Output folders ----


def test_a_folder_that_cannot_be_written_to_under_a_launcher(model, data, tmp_path):
    """Mounted read-only, since permissions do not stop the superuser."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine allows no mount namespace")
    folder = tmp_path / "locked"
    folder.mkdir()
    script = f'mount -t tmpfs -o ro none {folder} && exec "$@"'
    process = start_command(
        *("train", "--profile", "cpu-ddp", "--model_name_or_path", model, "--data_dir", data),
        *("--output_dir", folder / "run", "--max_steps", 1),
        before=("unshare", "-rm", "sh", "-c", script, "sh"),
    )
    outcome = finish(process)
    refused(outcome, "rank ", f"output_dir={folder}/run", "Read-only file system")


def test_as_a_user_types_it(model, data, tmp_path):
    files = ("--model", model, "--data_dir", data, "--output_dir", tmp_path / "run")
    outcome = run_command("train", *files, "--profile", "cpu-zero4")
    refused(outcome, "unknown profile 'cpu-zero4'", "did you mean 'cpu-zero")
    assert outcome.out == "" and outcome.err.count("\n") == 1


def test_fp16_is_refused_for_t5_with_the_reason(here, data, tmp_path):
    common = f"--architecture t5 --size tiny --vocab_size 100 --data_dir {data}".split()
    assert cli.main(["new-model", *common, "--output_dir", str(tmp_path / "t5")]) == 0
    files = ("--model", tmp_path / "t5", "--data_dir", data, "--output_dir", tmp_path / "run")
    outcome = here("train", *files, "--profile", "cpu", "--fp16")
    refused(outcome, "fp16", "'t5' overflow in fp16", "bf16")
