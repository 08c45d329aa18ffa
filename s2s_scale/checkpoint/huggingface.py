"""Checkpoint folders of transformers' own trainer: read by parameter name, and converted.

``optimizer.pt`` identifies a parameter by its position in the optimizer's groups; which parameter
is at which position follows from how the groups were made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from s2s_scale.backends.base import ParameterState
from s2s_scale.checkpoint.atomic import atomic_dir
from s2s_scale.checkpoint.manager import STATE_FILE, check_whole
from s2s_scale.checkpoint.manifest import MANIFEST, write_manifest
from s2s_scale.checkpoint.portable import (
    MASTER,
    OPTIMIZER,
    TRAINING_STATE,
    StateWriter,
    finalize_shards,
    read_json,
    weight_keys,
    write_json,
    write_states,
)
from s2s_scale.checkpoint.tensors import TensorReader
from s2s_scale.errors import UserError
from s2s_scale.optim import decay_parameter_names

Shapes = Mapping[str, tuple[int, ...]]
OPTIMIZER_FILE, SCHEDULE_FILE, SCALER_FILE = "optimizer.pt", "scheduler.pt", "scaler.pt"


class HFTrainerCheckpoint:
    """Weights and moments of a transformers checkpoint; ``checkpoint(name)`` is one parameter's.

    Everything is read with ``weights_only``.

    Args:
        shapes: parameter of ``model`` -> whole shape.
        trainable: names of what the optimizer was made over, in the order of the model; by default
            what is not frozen in ``model``.

    Raises:
        UserError: optimizer or schedule are missing, or belong to another model.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        shapes: Shapes,
        *,
        trainable: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        for name in (OPTIMIZER_FILE, SCHEDULE_FILE):
            if not (folder / name).is_file():
                raise UserError(
                    f"resume_from_checkpoint={folder}: has no {name}; start from its weights with "
                    f"--model_name_or_path {folder}"
                )
        self.keys = weight_keys(model)
        self.schedule = load_plain(folder / SCHEDULE_FILE)
        scaler = folder / SCALER_FILE
        self.scaler: Mapping[str, Any] = load_plain(scaler) if scaler.is_file() else {}
        self._optimizer = load_plain(folder / OPTIMIZER_FILE)
        self._weights = TensorReader(folder, "model")
        binary = folder / "pytorch_model.bin"
        self._binary = load_plain(binary) if not len(self._weights) and binary.is_file() else {}
        if trainable is None:
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        names = names_by_position(
            folder / OPTIMIZER_FILE, self._optimizer, model, shapes=shapes, trainable=trainable
        )
        self._position = {name: position for position, name in enumerate(names)}

    def __call__(self, name: str, *, weight: bool = True, moments: bool = True) -> ParameterState:
        """State of a parameter, as ``StateReader`` gives it."""
        position, key = self._position.get(name), self.keys.of_parameter.get(name)
        state = self._optimizer["state"].get(position, {}) if moments else {}
        kept = {moment: value for moment, value in state.items() if value is not None}
        found = self.buffer(key) if weight and key is not None else None
        return ParameterState(name, found, kept)

    def expects(self, name: str) -> bool:
        """Whether a checkpoint of this model holds the parameter."""
        return name in self.keys.of_parameter

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a parameter's weight; None where the checkpoint holds none."""
        key = self.keys.of_parameter.get(name)
        if key in self._binary:
            return tuple(self._binary[key].shape)
        return self._weights.shape(key) if key is not None and key in self._weights else None

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The loss scaler, as a backend's ``loss_scale`` gives it."""
        if not self.scaler:
            return None
        good = int(self.scaler["_growth_tracker"])
        return {"scale": float(self.scaler["scale"]), "good_steps": good}

    def load_buffers(self, model: nn.Module) -> None:
        """Copy saved buffers into ``model``."""
        buffers = model.state_dict() if self.keys.buffers else {}
        with torch.no_grad():
            for key in self.keys.buffers:
                saved = self.buffer(key)
                if saved is not None:
                    buffers[key].copy_(saved)

    def buffer(self, key: str) -> Tensor | None:
        """A saved buffer."""
        if key in self._weights:
            return self._weights.get(key)
        return self._binary.get(key)

    @property
    def optimizer_name(self) -> str:
        """``optim`` of the run that wrote the checkpoint, as far as its moments tell."""
        moments = {key for state in self._optimizer["state"].values() for key in state}
        return "adafactor" if moments & {"RMS", "exp_avg_sq_row"} else "adamw_torch"


def load_plain(path: Path) -> dict[str, Any]:
    """A torch file that holds tensors, numbers and containers, and nothing else.

    Raises:
        UserError: it cannot be read so.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be read without running code from it ({reason}); expected tensors and "
            "numbers; use another checkpoint"
        ) from error


def names_by_position(
    file: Path,
    optimizer: Mapping[str, Any],
    model: nn.Module,
    *,
    shapes: Shapes,
    trainable: Sequence[str],
) -> list[str]:
    """The parameter at each position of a saved optimizer.

    transformers decides by name which parameters decay, this package by module; where both fit the
    saved groups, they put the same parameter at each position, or the shapes tell them apart.

    Raises:
        UserError: neither fits.
    """
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    for candidate in _candidates(model, trainable):
        names = [name for group in candidate for name in group]
        if [len(group) for group in candidate] == sizes and _fits(names, optimizer, shapes):
            return names
    raise UserError(
        f"{file}: holds groups of {' and '.join(map(str, sizes))} parameters; expected those of "
        f"this model, which trains {len(trainable)}; give the model and the freeze flags that the "
        "run was started with"
    )


def _candidates(model: nn.Module, trainable: Sequence[str]) -> Iterator[list[list[str]]]:
    """Groups that an optimizer over these parameters may have been made with.

    transformers' are those of ``Trainer.get_decay_parameter_names``, which reads nothing of the
    trainer.
    """
    stock: Any = transformers.Trainer.get_decay_parameter_names
    for decaying in (stock(SimpleNamespace(), model), decay_parameter_names(model)):
        decayed = [name for name in trainable if name in set(decaying)]
        groups = [decayed, [name for name in trainable if name not in set(decaying)]]
        yield groups
        yield [group for group in groups if group]
    yield [list(trainable)]  # ours, where nothing decays


def _fits(names: list[str], optimizer: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether each saved moment of a parameter's full shape has the shape of that parameter."""
    for position, name in enumerate(names):
        for moment, value in optimizer["state"].get(position, {}).items():
            if moment.startswith("exp_avg") and isinstance(value, Tensor):
                whole = {"exp_avg_sq_row": shapes[name][:-1]}.get(moment)
                if moment == "exp_avg_sq_col":
                    whole = shapes[name][:-2] + shapes[name][-1:]
                if tuple(value.shape) != (shapes[name] if whole is None else whole):
                    return False
    return True


_NOT_COPIED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "model*.safetensors*",
    f"{OPTIMIZER}*",
    f"{MASTER}*",
    MANIFEST,
)
"""Patterns of the files that conversion writes anew, or for which it has no use."""


def convert(source: Path, target: Path) -> None:
    """Write a checkpoint of transformers' trainer as a portable one into the folder ``target``.

    Raises:
        UserError: the source is damaged, portable already or sharded by DeepSpeed, its optimizer
            belongs to another model, or the target exists.
    """
    if target.exists():
        raise UserError(f"--output_dir {target}: exists; give the name of a new folder")
    check_whole(source)
    sharded = sorted(path.name for path in source.glob("global_step*"))
    if sharded:
        raise UserError(
            f"{source}: holds optimizer state sharded by DeepSpeed ({sharded[0]}); expected one "
            "optimizer.pt; start from its weights with --model_name_or_path instead"
        )
    if (source / TRAINING_STATE).is_file() and not (source / OPTIMIZER_FILE).is_file():
        raise UserError(f"{source}: is portable already; it needs no conversion")
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):  # its weights need no memory
        model: Any = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    saved = HFTrainerCheckpoint(source, model, shapes)
    state = read_json(source / STATE_FILE)
    with atomic_dir(target) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
                shutil.copy2(path, folder / path.name)
        for key in saved.keys.buffers:
            value = saved.buffer(key)
            if value is not None:
                module, _, name = key.rpartition(".")
                model.get_submodule(module).register_buffer(name, value)
        writer = StateWriter(folder, model)
        states = (saved(name) for name, _ in model.named_parameters())
        content = finalize_shards(folder, [write_states(states, writer)])
        training = {
            "step": state["global_step"],
            "epoch": state["epoch"],
            "plan": None,
            "schedule": json.loads(json.dumps(saved.schedule)),
            "loss_scale": saved.loss_scale,
            "run": {},
            "optimizer": {"class": saved.optimizer_name, "numbers": content.numbers},
        }
        write_json(folder / TRAINING_STATE, training)
        write_manifest(folder, step=int(state["global_step"]), known=content.entries)
