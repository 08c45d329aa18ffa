"""Portable checkpoints: weights and optimizer state by parameter name, the same for all backends.

Everything is safetensors or JSON; ``docs/reference/checkpoint-format.md`` describes the files.
Weights are saved under the keys that transformers uses, so that ``from_pretrained`` can load them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from s2s_scale.backends.base import ParameterState
from s2s_scale.checkpoint.compat import keys_not_saved
from s2s_scale.checkpoint.manifest import DamagedCheckpoint, Entry
from s2s_scale.checkpoint.tensors import SHARD_BYTES, Part, TensorReader, TensorWriter, name_parts
from s2s_scale.errors import UserError

STEMS = ("model", "master_weights", "optimizer")
WEIGHTS, MASTER, OPTIMIZER = STEMS
TRAINING_STATE = "training_state.json"
SETTINGS = "settings.json"

Numbers = dict[str, dict[str, "int | float"]]
"""Moments that are not tensors: name of the moment -> parameter -> value."""


@dataclass(frozen=True)
class WeightKeys:
    """The keys of a model's weight file.

    Attributes:
        of_parameter: name in ``model.named_parameters()`` -> key in the file. Parameters that
            transformers recomputes when loading (such as sinusoidal positions) have none.
        buffers: keys of buffers that are saved.
        converts: whether transformers converts weights on saving, so that the file's tensors
            differ from the model's; the keys are those before the conversion.
    """

    of_parameter: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    converts: bool = False


def weight_keys(model: nn.Module) -> WeightKeys:
    """The keys of ``model``; the same whether or not its weights are sharded."""
    omitted = set(getattr(model, "all_tied_weights_keys", None) or ()) | keys_not_saved(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    of_parameter = {}
    for name, parameter in model.named_parameters():
        kept = [alias for alias in aliases[id(parameter)] if alias not in omitted]
        if kept:
            of_parameter[name] = kept[0]
    names = {alias for same in aliases.values() for alias in same}
    buffers = tuple(key for key in model.state_dict() if key not in names | omitted)
    keys = {*of_parameter.values(), *buffers}
    empty = {key: torch.empty(2, 2, device="meta") for key in [*of_parameter.values(), *buffers]}
    return WeightKeys(of_parameter, buffers, converts=set(reverted(model, empty)) != keys)


def reverted(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` as transformers saves them, with its conversion on loading reverted."""
    if not hasattr(model, "config"):
        return weights
    revert: Callable[[Any, Any], dict[str, torch.Tensor]] = revert_weight_conversion
    return revert(model, weights)


@dataclass
class Written:
    """What one rank has written: stem -> files, and the numbers that go to the training state."""

    parts: dict[str, list[Part]] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)


class StateWriter:
    """Writes the stream of a backend's ``state`` into a folder, one shard at a time.

    Rank 0 also writes the model's buffers.
    """

    def __init__(
        self, folder: Path, model: nn.Module, *, shard_bytes: int = SHARD_BYTES, rank: int = 0
    ) -> None:
        self.model = model
        self.rank = rank
        self.keys = weight_keys(model)
        self.numbers: Numbers = {}
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self._weights, self._master, self._optimizer = (
            TensorWriter(folder, stem, shard_bytes=shard_bytes, rank=rank) for stem in STEMS
        )
        self._to_convert: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] | None = None

    def move_to(self, folder: Path) -> None:
        """Change the folder; only before anything is written."""
        for writer in (self._weights, self._master, self._optimizer):
            writer.folder = folder

    def hold_buffers(self) -> None:
        """Copy the model's buffers now, so that training can continue while this writes."""
        state = self.model.state_dict()
        self._buffers = {key: state[key].detach().cpu().clone() for key in self.keys.buffers}

    def add(self, state: ParameterState) -> None:
        """Add the state of one parameter."""
        name, weight = state.name, state.weight
        key = self.keys.of_parameter.get(name)
        # Without a key, only what is trained is saved: transformers recomputes the rest.
        if weight is not None and (key is not None or state.moments):
            own = weight.to(self._dtypes[name])
            if key is None or self.keys.converts or weight.dtype != own.dtype:
                self._master.add(name, weight)
            if key is not None:
                self._save_as(key, own)
        for moment, value in sorted(state.moments.items()):
            if isinstance(value, Tensor):
                self._optimizer.add(f"{moment}/{name}", value)
            else:
                self.numbers.setdefault(moment, {})[name] = value

    def _save_as(self, key: str, tensor: Tensor) -> None:
        if self.keys.converts:  # transformers converts all weights together
            self._to_convert[key] = tensor
        else:
            self._weights.add(key, tensor)

    def finish(self) -> Written:
        """Write the buffers and the last shards; returns all that this rank has written."""
        if self.rank == 0:
            buffers = self._buffers
            if buffers is None:
                buffers = self.model.state_dict() if self.keys.buffers else {}
            for key in self.keys.buffers:
                self._save_as(key, buffers[key].detach().cpu())
        for key, tensor in reverted(self.model, self._to_convert).items():
            self._weights.add(key, tensor)
        writers = (self._weights, self._master, self._optimizer)
        return Written({writer.stem: writer.finish() for writer in writers}, self.numbers)


@dataclass(frozen=True)
class Content:
    """Files of a portable checkpoint whose checksums are known, and the optimizer's numbers."""

    entries: Mapping[str, Entry]
    numbers: Numbers


def finalize_shards(folder: Path, written: Sequence[Written]) -> Content:
    """Name the files of all ranks as one set. One rank calls it, when all have finished writing."""
    entries: dict[str, Entry] = {}
    for stem in STEMS:
        parts = [part for one in written for part in one.parts.get(stem, ())]
        entries |= name_parts(folder, stem, parts)
    numbers: Numbers = {}
    for one in written:
        for moment, values in one.numbers.items():
            numbers.setdefault(moment, {}).update(values)
    return Content(entries, numbers)


def write_states(states: Iterable[ParameterState], writer: StateWriter | None) -> Written:
    """Write all ``states``; ranks without a ``writer`` only take part in gathering them.

    The stream is consumed to its end even if writing fails, since the other ranks keep sending.
    """
    failure: BaseException | None = None
    for state in states:
        if writer is None or failure is not None:
            continue
        try:
            writer.add(state)
        except Exception as error:  # noqa: BLE001  (raised below)
            failure = error
    try:
        if failure is not None:
            raise failure
        return Written() if writer is None else writer.finish()
    finally:
        del failure


def copy_to_host(states: Iterable[ParameterState]) -> list[ParameterState]:
    """Copy all ``states`` that have a weight to host memory, so that training can continue."""
    copies = []
    for name, weight, moments in states:
        if weight is not None:
            copied = {m: v.clone() if isinstance(v, Tensor) else v for m, v in moments.items()}
            copies.append(ParameterState(name, weight.clone(), copied))
    return copies


class PortableCheckpoint:
    """Context manager that reads a portable checkpoint by parameter name.

    Attributes:
        training: the content of ``training_state.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.training = read_json(folder / TRAINING_STATE)
        self._weights = TensorReader(folder, WEIGHTS)
        self._master = TensorReader(folder, MASTER)
        self._optimizer = TensorReader(folder, OPTIMIZER)
        self._numbers: Mapping[str, Mapping[str, Any]] = (self.training.get("optimizer") or {}).get(
            "numbers", {}
        )
        self._moments: dict[str, list[str]] = {}
        for key in self._optimizer:
            moment, _, name = key.partition("/")
            self._moments.setdefault(name, []).append(moment)

    def __enter__(self) -> PortableCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for reader in (self._weights, self._master, self._optimizer):
            reader.__exit__(kind, error, trace)

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint contains optimizer state."""
        return self.training.get("optimizer") is not None

    def reader_for(self, model: nn.Module) -> StateReader:
        """A reader of this checkpoint by the parameter names of ``model``."""
        return StateReader(self, weight_keys(model))


class SavedState(Protocol):
    """State by parameter name, from a portable checkpoint or from one of transformers'."""

    def __call__(
        self, name: str, *, weight: bool = True, moments: bool = True
    ) -> ParameterState: ...

    def shape(self, name: str) -> tuple[int, ...] | None: ...

    def expects(self, name: str) -> bool: ...

    def load_buffers(self, model: nn.Module) -> None: ...


class StateReader:
    """Source for a backend's ``load_state``: ``reader(name)`` returns one parameter's state."""

    def __init__(self, saved: PortableCheckpoint, keys: WeightKeys) -> None:
        self._saved = saved
        self._keys = keys

    def __call__(self, name: str, *, weight: bool = True, moments: bool = True) -> ParameterState:
        """State of a parameter; ``weight`` is None if the checkpoint has none."""
        saved = self._saved
        found = self._find(name) if weight else None
        state: dict[str, Tensor | int | float] = {}
        if moments:
            state = {m: saved._optimizer.get(f"{m}/{name}") for m in saved._moments.get(name, ())}
            for moment, values in saved._numbers.items():
                if name in values:
                    state[moment] = values[name]
        return ParameterState(name, found[0].get(found[1]) if found else None, state)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a parameter's weight; None if the checkpoint has none."""
        found = self._find(name)
        return found[0].shape(found[1]) if found else None

    def load_buffers(self, model: nn.Module) -> None:
        """Copy the saved buffers into ``model``."""
        if self._keys.converts:
            return
        buffers = model.state_dict() if self._keys.buffers else {}
        with torch.no_grad():
            for key in self._keys.buffers:
                if key in self._saved._weights:
                    buffers[key].copy_(self._saved._weights.get(key))

    def _find(self, name: str) -> tuple[TensorReader, str] | None:
        key = self._keys.of_parameter.get(name)
        if name in self._saved._master:
            return self._saved._master, name
        if key is not None and not self._keys.converts and key in self._saved._weights:
            return self._saved._weights, key
        return None

    def expects(self, name: str) -> bool:
        """Whether checkpoints of this model contain the parameter."""
        return name in self._keys.of_parameter


def check_fits(folder: Path, reader: SavedState, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of another model.

    Args:
        shapes: parameter -> full shape in the model.

    Raises:
        UserError: names the first parameter that is missing or has another shape.
    """
    for name, expected in shapes.items():
        found = reader.shape(name)
        if found is None and not reader.expects(name):
            continue
        if found != expected:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(
                f"{folder}: another architecture or vocabulary: {name} {what} in the checkpoint; "
                f"expected {list(expected)}, as in the model; give the model that the run was "
                "started from"
            )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedCheckpoint: the file is missing or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error}); use an older checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path}: expected a JSON object; use an older checkpoint")
    return content
