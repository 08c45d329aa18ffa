"""Conversion between portable checkpoints and the files of transformers' trainer, without a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from s2s_scale.backends.base import ParameterState
from s2s_scale.checkpoint.folders import STATE_FILE, check_whole
from s2s_scale.checkpoint.manifest import MANIFEST, write_manifest
from s2s_scale.checkpoint.portable import (
    MASTER,
    OPTIMIZER,
    TRAINING_STATE,
    PortableCheckpoint,
    StateWriter,
    put_together,
    read_json,
    write_json,
    write_states,
)
from s2s_scale.checkpoint.stock import (
    OPTIMIZER_FILE,
    SCHEDULE_FILE,
    StockCheckpoint,
)
from s2s_scale.checkpoint.writing import whole_folder
from s2s_scale.errors import UserError
from s2s_scale.optim import parameter_groups

_TENSOR_FILES = (f"{OPTIMIZER}*", f"{MASTER}*", "*.pt", "*.pth", "training_args.bin", MANIFEST)


def convert(source: Path, target: Path, kind: str) -> None:
    """Write the checkpoint ``source`` as ``kind`` (portable or native) into the folder ``target``.

    Raises:
        UserError: the source is damaged, of that kind already or of a backend's own kind, or the
            target exists.
    """
    if target.exists():
        raise UserError(f"--output_dir {target}: exists; give the name of a new folder")
    check_whole(source)
    sharded = sorted(path.name for path in source.glob("global_step*"))
    if sharded:
        raise UserError(
            f"{source}: holds DeepSpeed's own files ({sharded[0]}); they are read back by the same "
            "profile at the same number of processes: go on there with --checkpoint_format portable"
        )
    portable = (source / f"{TRAINING_STATE}").is_file() and not (source / OPTIMIZER_FILE).is_file()
    if portable == (kind == "portable"):
        raise UserError(f"{source}: is {kind} already; expected --to the other format")
    with whole_folder(target) as folder:
        if kind == "native":
            _to_native(source, folder)
        else:
            _to_portable(source, folder)


def _to_native(source: Path, folder: Path) -> None:
    _copy_beside(source, folder)
    with PortableCheckpoint(source) as saved:
        model = bare_model(source)
        optimizer = _optimizer_dict(saved, model)
        torch.save(optimizer, folder / OPTIMIZER_FILE)
        torch.save(saved.training["schedule"], folder / SCHEDULE_FILE)
    write_manifest(folder, kind="native", step=int(saved.training["step"]))


def _to_portable(source: Path, folder: Path) -> None:
    model = bare_model(source)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = (source / TRAINING_STATE).is_file()
    frozen = read_json(source / TRAINING_STATE)["frozen"] if known else ()
    trainable = [name for name in shapes if name not in frozen] if known else None
    saved = StockCheckpoint(source, model, shapes, trainable=trainable)
    _copy_beside(source, folder, without=("*.bin", "model*.safetensors*"))
    buffers = {key: saved.buffer(key) for key in saved.keys.buffers}
    for key, value in buffers.items():
        if value is not None:
            _set_buffer(model, key, value)
    writer = StateWriter(folder, model)
    content = put_together(folder, [write_states(_states(saved, model), writer)])
    training = _training_state(source, saved)
    training["optimizer"] = {"class": _class_of(saved), "numbers": content.numbers}
    write_json(folder / TRAINING_STATE, training)
    step = int(training["step"])
    write_manifest(folder, kind="portable", step=step, known=content.entries)


def bare_model(folder: Path) -> Any:
    """The model of a checkpoint's configuration, without memory for its weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.tie_weights()
    return model


def _states(saved: StockCheckpoint, model: nn.Module) -> Iterator[ParameterState]:
    return (saved(name) for name, _ in model.named_parameters())


def _set_buffer(model: nn.Module, key: str, value: torch.Tensor) -> None:
    module, _, name = key.rpartition(".")
    model.get_submodule(module)._buffers[name] = value


def _training_state(source: Path, saved: StockCheckpoint) -> dict[str, Any]:
    """The run's position; of transformers' own checkpoints it is in the trainer's state alone."""
    if (source / TRAINING_STATE).is_file():
        return read_json(source / TRAINING_STATE)
    state = read_json(source / STATE_FILE)
    return {
        "step": state["global_step"],
        "epoch": state["epoch"],
        "plan": None,
        "schedule": json.loads(json.dumps(saved.schedule)),
        "loss_scale": saved.loss_scale,
        "run": {},
    }


def _class_of(saved: StockCheckpoint) -> str:
    moments = {key for state in saved._optimizer["state"].values() for key in state}
    return "adafactor" if moments & {"RMS", "exp_avg_sq_row"} else "adamw_torch"


def _optimizer_dict(saved: PortableCheckpoint, model: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` as the run's optimizer would give it in one process."""
    settings = (saved.training.get("run") or {}).get("optimizer") or {}
    read = saved.reader_for(model)
    frozen = saved.training.get("frozen")
    for name, parameter in model.named_parameters():
        trained = bool(read(name, weight=False).moments) if frozen is None else name not in frozen
        parameter.requires_grad_(trained)
    groups = parameter_groups(model, float(settings.get("weight_decay") or 0.0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adafactor = saved.training["optimizer"]["class"] == "adafactor"
    kind: Any = transformers.Adafactor if adafactor else torch.optim.AdamW
    options: dict[str, Any] = (
        {"relative_step": False, "scale_parameter": False}
        if adafactor
        else {
            "betas": (settings.get("adam_beta1", 0.9), settings.get("adam_beta2", 0.999)),
            "eps": settings.get("adam_epsilon", 1e-8),
        }
    )
    state = kind(groups, lr=float(settings.get("learning_rate", 5e-5)), **options).state_dict()
    rates = zip(
        state["param_groups"],
        saved.training["schedule"]["_last_lr"],
        saved.training["schedule"]["base_lrs"],
        strict=True,
    )
    for group, rate, base in rates:
        group |= {"lr": rate, "initial_lr": base}
    order = [names[id(parameter)] for group in groups for parameter in group["params"]]
    state["state"] = {
        place: dict(moments)
        for place, name in enumerate(order)
        if (moments := read(name, weight=False).moments)
    }
    return dict(state)


def _copy_beside(source: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Copy what both kinds have: weights, configuration, tokenizer, the trainer's state."""
    for path in sorted(source.iterdir()):
        left = any(path.match(pattern) for pattern in (*_TENSOR_FILES, *without))
        if path.is_file() and not left:
            shutil.copy2(path, folder / path.name)
