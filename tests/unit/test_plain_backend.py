"""The plain backend: what it refuses, and that one process is its own collective."""

from __future__ import annotations

import pytest
import torch

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.errors import UserError
from tests.support.families import tiny_model

ALL = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def variables(monkeypatch):
    def put(**values):
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match="unknown backend 'locl' .did you mean 'local'"):
        make_backend("locl", "cpu")


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "RANK", "MASTER_ADDR"])
def test_half_of_a_launchers_variables_are_refused(variables, missing):
    variables(**{name: value for name, value in ALL.items() if name != missing})
    (problem,) = Backend("cpu").problems()
    assert f"{missing} not: a launcher sets all of them" in problem


def test_all_variables_none_or_a_leftover_address_are_fine(variables):
    for values in (ALL, {}, {"MASTER_ADDR": "here"}, {"WORLD_SIZE": "1"}):
        variables(**values)
        assert Backend("cpu").problems() == []


def test_a_single_process_is_its_own_collective(variables):
    backend = Backend("cpu")
    backend.prepare_process()
    rows = torch.arange(6).view(2, 3)
    assert (backend.collectives.rank, backend.collectives.world_size) == (0, 1)
    assert torch.equal(backend.collectives.all_reduce_sum(rows), rows)
    assert torch.equal(backend.collectives.gather_rows(rows, 0), rows)
    assert backend.collectives.gather_objects("x") == ["x"]
    with backend.collectives.main_first():
        pass
    backend.close()


def test_a_plain_trainer_takes_the_device_of_its_arguments(monkeypatch, tmp_path):
    def backend():
        args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        return Seq2SeqTrainer(model=tiny_model("t5"), args=args).backend

    assert backend().device == "cpu" and backend().cpu_functions is not None
    found = Seq2SeqTrainingArguments.device.fget
    elsewhere = property(lambda self: found(self) and torch.device("meta"))
    monkeypatch.setattr(Seq2SeqTrainingArguments, "device", elsewhere)
    assert backend().device == "meta" and backend().cpu_functions is None


def test_an_adapter_must_be_told_its_device():
    with pytest.raises(TypeError, match="device"):
        Backend()
