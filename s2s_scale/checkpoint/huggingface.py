"""Checkpoints of transformers' own trainer: read by parameter name, and converted.

``optimizer.pt`` identifies a parameter by its position in the optimizer's groups; which parameter
that is depends on how the groups were formed.
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
from s2s_scale.checkpoint.manager import STATE_FILE, check_intact
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
    """A checkpoint of transformers' trainer; ``checkpoint(name)`` returns one parameter's state.

    Everything is loaded with ``weights_only=True``.

    Args:
        shapes: parameter of ``model`` -> full shape.
        trainable: names of the optimizer's parameters, in the order of the model; by default those
            of ``model`` that are not frozen.

    Raises:
        UserError: optimizer or schedule is missing, or belongs to another model.
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
        """State of a parameter, as ``StateReader`` returns it."""
        position, key = self._position.get(name), self.keys.of_parameter.get(name)
        state = self._optimizer["state"].get(position, {}) if moments else {}
        kept = {moment: value for moment, value in state.items() if value is not None}
        found = self.tensor(key) if weight and key is not None else None
        return ParameterState(name, found, kept)

    def expects(self, name: str) -> bool:
        """Whether checkpoints of this model contain the parameter."""
        return name in self.keys.of_parameter

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a parameter's weight; None if the checkpoint has none."""
        key = self.keys.of_parameter.get(name)
        if key in self._binary:
            return tuple(self._binary[key].shape)
        return self._weights.shape(key) if key is not None and key in self._weights else None

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of the loss scaler, as returned by a backend's ``loss_scale``."""
        if not self.scaler:
            return None
        good = int(self.scaler["_growth_tracker"])
        return {"scale": float(self.scaler["scale"]), "good_steps": good}

    def load_buffers(self, model: nn.Module) -> None:
        """Copy the saved buffers into ``model``."""
        buffers = model.state_dict() if self.keys.buffers else {}
        with torch.no_grad():
            for key in self.keys.buffers:
                saved = self.tensor(key)
                if saved is not None:
                    buffers[key].copy_(saved)

    def tensor(self, key: str) -> Tensor | None:
        """The saved tensor of a key, or None."""
        if key in self._weights:
            return self._weights.get(key)
        return self._binary.get(key)

    @property
    def optimizer_name(self) -> str:
        """``optim`` of the run that wrote the checkpoint, inferred from the moments."""
        moments = {key for state in self._optimizer["state"].values() for key in state}
        return "adafactor" if moments & {"RMS", "exp_avg_sq_row"} else "adamw_torch"


def load_plain(path: Path) -> dict[str, Any]:
    """Load a torch file that contains only tensors, numbers and containers.

    Raises:
        UserError: it cannot be loaded with ``weights_only=True``.
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

    transformers decides by name which parameters decay, this package by module. If both match the
    saved groups, they give the same order, or the shapes of the moments decide between them.

    Raises:
        UserError: neither matches.
    """
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    for candidate in _candidates(model, trainable):
        names = [name for group in candidate for name in group]
        if [len(group) for group in candidate] == sizes and _fits(names, optimizer, shapes):
            return names
    raise UserError(
        f"{file}: has groups of {' and '.join(map(str, sizes))} parameters; expected those of "
        f"this model, which trains {len(trainable)}; give the model and the freeze flags that the "
        "run was started with"
    )


def _candidates(model: nn.Module, trainable: Sequence[str]) -> Iterator[list[list[str]]]:
    """Ways in which the parameters of an optimizer may have been grouped.

    transformers' own uses ``Trainer.get_decay_parameter_names``, which does not use ``self``.
    """
    stock: Any = transformers.Trainer.get_decay_parameter_names
    for decaying in (stock(SimpleNamespace(), model), decay_parameter_names(model)):
        decayed = [name for name in trainable if name in set(decaying)]
        groups = [decayed, [name for name in trainable if name not in set(decaying)]]
        yield groups
        yield [group for group in groups if group]
    yield [list(trainable)]  # this package's, if nothing decays


def _fits(names: list[str], optimizer: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether the saved moments have the shapes that the parameters ``names`` imply."""
    for position, name in enumerate(names):
        for moment, value in optimizer["state"].get(position, {}).items():
            if moment.startswith("exp_avg") and isinstance(value, Tensor):
                shape = shapes[name]
                factored = {  # of Adafactor
                    "exp_avg_sq_row": shape[:-1],
                    "exp_avg_sq_col": shape[:-2] + shape[-1:],
                }
                if tuple(value.shape) != factored.get(moment, shape):
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
"""Patterns of the files that conversion rewrites or does not need."""


def convert(source: Path, target: Path) -> None:
    """Convert a checkpoint of transformers' trainer to a portable one in the folder ``target``.

    Raises:
        UserError: the source is damaged, already portable or sharded by DeepSpeed, its optimizer
            belongs to another model, or the target exists.
    """
    if target.exists():
        raise UserError(f"--output_dir {target}: already exists; give a new folder")
    check_intact(source)
    sharded = sorted(path.name for path in source.glob("global_step*"))
    if sharded:
        raise UserError(
            f"{source}: contains optimizer state sharded by DeepSpeed ({sharded[0]}); expected one "
            "optimizer.pt; start from its weights with --model_name_or_path instead"
        )
    if (source / TRAINING_STATE).is_file() and not (source / OPTIMIZER_FILE).is_file():
        raise UserError(f"{source}: is already portable; no conversion is needed")
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):  # the weights need no memory
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
            value = saved.tensor(key)
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
