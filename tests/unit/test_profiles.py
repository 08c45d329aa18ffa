"""Launcher profiles: search path, ``extends``, validation, origins."""

from __future__ import annotations

import pytest
import yaml

from s2s_scale import cli
from s2s_scale.errors import UserError
from s2s_scale.settings import profiles
from s2s_scale.settings.profiles import as_yaml, available, resolve, search_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder whose ``launchers/profiles`` is searched first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    profiles_folder = tmp_path / "launchers" / "profiles"
    profiles_folder.mkdir(parents=True)
    return profiles_folder


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def problems(name):
    with pytest.raises(UserError) as caught:
        resolve(name)
    return caught.value.problems


def test_shipped_profiles_resolve(folder):
    shipped = available()
    zero = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
    kinds = ("", "-ddp", "-oss", "-fsdp", *(f"-{stage}" for stage in zero))
    expected = {device + kind for device in ("cpu", "gpu") for kind in kinds}
    expected |= {"cpu-xla", "cpu-xla-fsdp", "tpu-vm", "tpu-vm-fsdp", "tpu-pod"}
    assert set(shipped) == expected
    for name in shipped:
        profile = resolve(name)
        assert profile.description
        assert profile.backend in profiles.BACKEND_NAMES
        assert profile.environment["USE_TORCH_XLA"] == "0"
    assert resolve("cpu").arguments == {"use_cpu": True}
    assert resolve("cpu").device == "cpu"
    assert resolve("gpu").device == "cuda"
    assert resolve("tpu-vm").mesh == {"data": -1}
    assert resolve("tpu-pod").mesh == resolve("cpu-xla-fsdp").mesh == {"data": 1, "fsdp": -1}
    assert resolve("tpu-pod").arguments == {"bf16": True}


def test_search_path_is_working_folder_then_user_then_shipped(folder, tmp_path):
    user = tmp_path / "config" / "s2s_scale" / "profiles"
    write(user, "cpu", "description: the user's\n")
    assert resolve("cpu").description == "the user's"
    write(folder, "cpu", "description: the folder's\n")
    assert resolve("cpu").description == "the folder's"
    assert [path.resolve() for path in search_path()][:2] == [folder, user]


def test_the_home_folder_is_searched_without_xdg(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / ".config" / "s2s_scale" / "profiles", "mine", "device: cpu\n")
    assert resolve("mine").device == "cpu"


def test_a_wheel_carries_them_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "s2s_scale"
    (package / "_shipped" / "launchers").mkdir(parents=True)
    monkeypatch.setattr(profiles, "__file__", str(package / "settings" / "profiles.py"))
    assert profiles.shipped_folder("launchers") == package / "_shipped" / "launchers"
    assert profiles.shipped_folder("ds_configs") == tmp_path / "site" / "ds_configs"


def test_a_path_works_where_a_name_does(folder, tmp_path):
    path = write(tmp_path / "elsewhere", "mine", "device: cpu\n")
    assert resolve(str(path)).name == "mine"
    assert problems(str(tmp_path / "none.yaml")) == (
        f"profile file '{tmp_path / 'none.yaml'}' does not exist",
    )


def test_unknown_name_gives_the_nearest(folder):
    (problem,) = problems("cpuu")
    assert problem == (
        "unknown profile 'cpuu' (did you mean 'cpu'?); expected the path of a YAML file or one "
        f"of: {', '.join(available())}"
    )


def test_extends_merges_mappings_and_replaces_the_rest(folder):
    parent = write(
        folder,
        "parent",
        "description: parent\ndevice: cpu\nprocesses: 1\n"
        "environment: {A: '1', B: '2'}\narguments: {bf16: true, learning_rate: 3e-4}\n",
    )
    child = write(
        folder,
        "child",
        "extends: parent\ndescription: child\nenvironment:\n  B: '3'\narguments:\n  max_steps: 5\n",
    )
    profile = resolve("child")
    assert profile.environment == {"A": "1", "B": "3"}
    assert profile.arguments == {"bf16": True, "learning_rate": 3e-4, "max_steps": 5}
    assert (profile.description, profile.processes) == ("child", 1)
    relative = {
        name: origin.replace(str(folder) + "/", "").rpartition("/")[2]
        for name, origin in profile.origins.items()
    }
    assert relative["processes"] == f"{parent.name}:3"
    assert relative["environment.A"] == f"{parent.name}:4"
    assert relative["environment.B"] == f"{child.name}:4"
    assert relative["arguments.max_steps"] == f"{child.name}:6"
    assert relative["mesh"] == "default"


def test_extends_a_path_beside_the_child(folder, tmp_path):
    write(tmp_path / "x", "base", "description: base\n")
    path = write(tmp_path / "x", "top", "extends: ./base.yaml\n")
    assert resolve(str(path)).description == "base"


def test_a_profile_may_extend_the_shipped_one_of_its_own_name(folder):
    write(folder, "cpu", "extends: cpu\nenvironment: {OMP_NUM_THREADS: 2}\n")
    profile = resolve("cpu")
    assert profile.environment["OMP_NUM_THREADS"] == "2"
    assert profile.environment["USE_TORCH_XLA"] == "0"


def test_cycle(folder):
    write(folder, "a", "extends: b\n")
    write(folder, "b", "device: cpu\nextends: a\n")
    (problem,) = problems("a")
    assert problem.endswith("b.yaml:2: extends: profiles extend each other: a -> b -> a")


def test_missing_parent(folder):
    write(folder, "a", "device: cpu\nextends: gpuu\n")
    (problem,) = problems("a")
    assert "a.yaml:2: extends: unknown profile 'gpuu' (did you mean 'gpu'?)" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bakend: local\n", "1: unknown key 'bakend' (did you mean 'backend'?)"),
        (
            "\nbackend: horovod\n",
            "2: backend: expected one of: local, fairscale_oss, torch_fsdp, deepspeed, xla, "
            "got 'horovod'",
        ),
        (
            "launcher: mpirun\n",
            "1: launcher: expected one of: none, torchrun, deepspeed, got 'mpirun'",
        ),
        ("device: cuba\n", "1: device: expected one of: cpu, cuda, tpu, got 'cuba'"),
        ("device: [cpu]\n", "1: device: expected one of: cpu, cuda, tpu, got a list"),
        ("processes: many\n", "1: processes: expected a whole number of at least 1 or auto"),
        ("processes: 0\n", "1: processes: expected a whole number of at least 1 or auto"),
        ("extends: [a, b]\n", "1: extends: expected the name of one profile"),
        ("environment: 3\n", "1: environment: expected names and values, got '3'"),
        ("environment: {A: [1]}\n", "1: environment: A: expected text, got a list"),
        ("arguments:\n  bf17: true\n", "2: arguments: unknown setting 'bf17' (did you mean 'bf16'"),
        ("arguments:\n  bf16: ten\n", "2: arguments: bf16: expected true or false, got 'ten'"),
        ("arguments: {bf16: true, bf16: true}\n", "1: 'bf16' is given twice (first in line 1)"),
        ("device: cpu\ndevice: cpu\n", "2: 'device' is given twice (first in line 1)"),
        ("device: {\n", "2: not valid YAML"),
        ("- device\n", "1: expected 'name: value' lines"),
        ("mesh: {data: many}\n", "1: mesh: data: expected a whole number, got 'many'"),
        ("mesh: {data: 0}\n", "1: mesh: data: expected a number of devices or -1 (all), got 0"),
        ("mesh: {data: -1}\n", "1: mesh: has no effect with backend local"),
        ("backend: xla\n", "1: backend: xla needs a mesh; give mesh: {data: -1}"),
        ("backend: xla\nmesh: {rows: -1}\n", "2: mesh: unknown axis 'rows'"),
        ("device: tpu\n", "1: device: tpu needs backend xla, not local"),
        ("extends: cpu-xla\ndevice: cuda\n", "2: device: backend xla runs on tpu or cpu"),
        ("extends: cpu-xla\nlauncher: torchrun\n", "2: launcher: with backend xla one process"),
        ("deepspeed_config: zero2\n", "1: deepspeed_config: has no effect with backend local"),
        ("processes: 2\n", "1: processes: launcher none starts one process, got 2"),
        (
            "device: cuda\narguments: {use_cpu: true}\n",
            "2: arguments: use_cpu: contradicts device cuda",
        ),
    ],
)
def test_bad_profiles_name_file_and_line(folder, text, expected):
    write(folder, "bad", text)
    found = problems("bad")
    assert len(found) == 1
    assert f"bad.yaml:{expected}" in found[0]


def test_all_problems_of_a_file_come_together(folder):
    write(folder, "bad", "backend: no\ndevice: tin\nwhat: 1\n")
    assert len(problems("bad")) == 3


def test_problems_of_the_parent_come_with_those_of_the_child(folder):
    write(folder, "parent", "backend: no\ndevice: cpu\ndevice: cpu\n")
    write(folder, "child", "extends: parent\nprocesses: 0\nmesh: {data: 0}\narguments: {bf17: 1}\n")
    found = problems("child")
    assert [problem.rpartition("/")[2].partition(": ")[0] for problem in found] == [
        "parent.yaml:3",
        "parent.yaml:1",
        "child.yaml:2",
        "child.yaml:3",
        "child.yaml:4",
    ]


def test_null_clears_a_mapping_of_the_parent(folder):
    write(folder, "mine", "extends: cpu\narguments:\nenvironment: ~\n")
    assert resolve("mine").arguments == resolve("mine").environment == {}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a CUDA device and a torch built for it; parts can be taken away."""
    library = tmp_path / "site" / "torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(profiles, "NVIDIA_DEVICE", device)
    monkeypatch.setattr(profiles, "WSL_DEVICE", tmp_path / "none")
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return {"library": library, "device": device}


def test_default_profile_where_cuda_is_usable(machine, monkeypatch):
    assert profiles.default_profile_name() == "gpu"
    assert resolve("gpu").unusable() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert profiles.default_profile_name() == "cpu"


@pytest.mark.parametrize("missing", ["library", "device"])
def test_default_profile_where_cuda_is_not_usable(machine, missing):
    machine[missing].unlink()
    assert profiles.default_profile_name() == "cpu"
    (problem,) = resolve("gpu").unusable()
    assert "profile 'gpu': is for device cuda" in problem
    assert resolve("cpu").unusable() == []


def test_no_torch_at_all(machine, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    assert not profiles.cuda_is_here()


def test_printed_profile_is_the_resolved_one_with_origins(folder, capsys):
    write(folder, "mine", "extends: cpu\narguments: {learning_rate: 3e-4, metrics: [bleu]}\n")
    assert cli.main(["profiles", "mine"]) == 0
    text = capsys.readouterr().out
    assert text == as_yaml(resolve("mine"))
    read = yaml.safe_load(text)
    assert read["arguments"] == {"use_cpu": True, "learning_rate": 3e-4, "metrics": ["bleu"]}
    assert read["environment"] == {"USE_TORCH_XLA": "0", "CUDA_VISIBLE_DEVICES": ""}
    line = next(line for line in text.splitlines() if "learning_rate" in line)
    assert line.endswith("mine.yaml:2")
    assert "# default" in next(line for line in text.splitlines() if line.startswith("mesh"))


def test_printed_profile_works_as_a_profile(folder, tmp_path):
    text = as_yaml(resolve("cpu"))
    path = write(tmp_path, "copy", text)
    copy, original = resolve(str(path)), resolve("cpu")
    assert (copy.arguments, copy.environment) == (original.arguments, original.environment)


def test_table(folder, monkeypatch, capsys):
    monkeypatch.setattr(profiles, "cuda_is_here", lambda: False)
    write(folder, "broken", "backend: horovod\n")
    assert cli.main(["profiles"]) == 2
    out, err = capsys.readouterr()
    rows = {name: next(x for x in out.splitlines() if f" {name} " in x) for name in ("cpu", "gpu")}
    assert "yes" in rows["cpu"]
    assert "no:" in rows["gpu"]
    assert "broken" in out
    assert "error: " in err
    assert "broken.yaml:1: backend" in err


def test_unknown_profile_through_the_command_line(folder, capsys):
    assert cli.main(["profiles", "gpuu"]) == 2
    assert "error: unknown profile 'gpuu' (did you mean 'gpu'?)" in capsys.readouterr().err
