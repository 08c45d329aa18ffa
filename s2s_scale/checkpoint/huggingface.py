"""Checkpoint folders of transformers' own trainer, read by parameter name.

``optimizer.pt`` knows parameters by their place in the optimizer's groups; which name stands at
which place follows from how the groups were made.

Conversion between portable checkpoints and the files of transformers' trainer, without a run.
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
    PortableCheckpoint,
    StateWriter,
    finalize_shards,
    read_json,
    weight_keys,
    write_json,
    write_states,
)
from s2s_scale.checkpoint.tensors import TensorReader
from s2s_scale.errors import UserError
from s2s_scale.optim import decay_parameter_names, parameter_groups

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
        names = names_by_place(
            folder / OPTIMIZER_FILE, self._optimizer, model, shapes=shapes, trainable=trainable
        )
        self._place = {name: place for place, name in enumerate(names)}

    def __call__(self, name: str, *, weight: bool = True, moments: bool = True) -> ParameterState:
        """State of a parameter, as ``StateReader`` gives it."""
        place = self._place.get(name)
        state = self._optimizer["state"].get(place, {}) if moments else {}
        kept = {moment: value for moment, value in state.items() if value is not None}
        return ParameterState(name, self._weight(name) if weight else None, kept)

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

    def _weight(self, name: str) -> Tensor | None:
        key = self.keys.of_parameter.get(name)
        return self.buffer(key) if key is not None else None


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


def names_by_place(
    file: Path,
    optimizer: Mapping[str, Any],
    model: nn.Module,
    *,
    shapes: Shapes,
    trainable: Sequence[str],
) -> list[str]:
    """The parameter at each place of a saved optimizer.

    transformers decides by names which parameters decay, we by modules; where both ways fit the
    saved groups they put the same parameter at each place, or shapes tell them apart.

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
    """Groups that an optimizer over these parameters may have been made with."""
    stock: Any = transformers.Trainer.get_decay_parameter_names
    for decaying in (stock(SimpleNamespace(), model), decay_parameter_names(model)):
        decayed = [name for name in trainable if name in set(decaying)]
        groups = [decayed, [name for name in trainable if name not in set(decaying)]]
        yield groups
        yield [group for group in groups if group]
    yield [list(trainable)]  # ours, where nothing decays


def _fits(names: list[str], optimizer: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether each saved moment of a parameter's full shape has the shape of that parameter."""
    for place, name in enumerate(names):
        for moment, value in optimizer["state"].get(place, {}).items():
            if moment.startswith("exp_avg") and isinstance(value, Tensor):
                whole = {"exp_avg_sq_row": shapes[name][:-1]}.get(moment)
                if moment == "exp_avg_sq_col":
                    whole = shapes[name][:-2] + shapes[name][-1:]
                if tuple(value.shape) != (shapes[name] if whole is None else whole):
                    return False
    return True


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
    with atomic_dir(target) as folder:
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
    saved = HFTrainerCheckpoint(source, model, shapes, trainable=trainable)
    _copy_beside(source, folder, without=("*.bin", "model*.safetensors*"))
    buffers = {key: saved.buffer(key) for key in saved.keys.buffers}
    for key, value in buffers.items():
        if value is not None:
            _set_buffer(model, key, value)
    writer = StateWriter(folder, model)
    content = finalize_shards(folder, [write_states(_states(saved, model), writer)])
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


def _states(saved: HFTrainerCheckpoint, model: nn.Module) -> Iterator[ParameterState]:
    return (saved(name) for name, _ in model.named_parameters())


def _set_buffer(model: nn.Module, key: str, value: torch.Tensor) -> None:
    module, _, name = key.rpartition(".")
    model.get_submodule(module)._buffers[name] = value


def _training_state(source: Path, saved: HFTrainerCheckpoint) -> dict[str, Any]:
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


def _class_of(saved: HFTrainerCheckpoint) -> str:
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
