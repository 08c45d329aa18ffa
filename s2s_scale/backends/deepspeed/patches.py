"""What this backend uses of the private parts of DeepSpeed and torch, and replaces of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from s2s_scale.compat import relies_on
from s2s_scale.utils import processes_holding

logger = logging.getLogger(__name__)

DEEPSPEED = ("0.18", "0.19")
"""First and last minor version that the functions below were tested with."""

STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"

OURS = "held by a process that also locks the file beside this one\n"
ABANDONED_SECONDS = 60.0
"""A lock of torch's own that is this old and that no process here has open is nobody's, unless a
machine that shares the folder compiles for that long: then the extension is compiled twice."""
LOOK_SECONDS = 0.5


@relies_on(
    "deepspeed",
    checked=DEEPSPEED,
    reason="the engine updates the weights inside the backward pass, before the gradients of the "
    "step can be looked at",
    uses={
        f"{STAGE_1_2}._update_scale": ("has_overflow",),
        f"{STAGE_1_2}.scaled_global_norm": ("norm_type",),
        f"{STAGE_1_2}.complete_grad_norm_calculation_for_cpu_offload": ("params",),
        f"{STAGE_1_2}.get_grad_norm_direct": ("gradients", "params", "norm_type"),
        f"{STAGE_3}._update_scale": ("has_overflow",),
        f"{STAGE_3}._get_norm_groups": None,
    },
)
class HeldUpdate:
    """Defers the optimizer update that DeepSpeed's engine performs after the backward pass.

    What the engine calls only computes the norm of the gradients, once; ``make`` does the rest when
    the trainer calls its optimizer, and ``drop`` clears the gradients in place of that. Every rank
    must call them.

    Args:
        zero: the optimizer of ZeRO 1, 2 or 3.
        wrapper: the trainer's optimizer around it, whose own ``step`` does nothing.
    """

    def __init__(self, zero: Any, wrapper: Any) -> None:
        self._zero = zero
        self._update, self._clear = zero.step, zero.zero_grad
        self._update_scale: Callable[[bool], None] = zero._update_scale
        self._waits = self._drops = self._overflow = False
        zero.step, zero.zero_grad = self._hold, self._keep
        zero._update_scale = self._decide
        # A method of the wrapper's own: torch's schedules bind it to the wrapper once more.
        wrapper.step = MethodType(lambda _, closure=None: self.make(), wrapper)

    def belongs_to(self, zero: Any) -> bool:
        """Whether it is this optimizer's update."""
        return self._zero is zero

    def make(self) -> None:
        """Make the update that waits, if one does."""
        if not self._waits:
            return
        self._waits = False
        self._update()
        self._clear()
        vars(self._zero).pop(_norm_method(self._zero), None)
        # Only a loss scaler's overflow keeps the schedule back, as under every other backend.
        self._zero.overflow = self._overflow and self._zero.dtype == torch.float16

    def drop(self) -> None:
        """Discard the pending update; weights, moments and step counts are unchanged."""
        self._drops = True
        try:
            self.make()
        finally:
            self._drops = False

    def _hold(self, closure: Any = None) -> None:
        """In place of ``step``, inside the backward pass."""
        zero, self._waits = self._zero, True
        zero.overflow, zero._global_grad_norm = False, None
        if not getattr(zero, "compute_grad_norm", True):
            return
        parts = _norms(zero)
        norm = _joined(parts)
        found = parts if _is_stage_3(zero) else norm
        setattr(zero, _norm_method(zero), lambda **_: found)  # the update asks for it again
        zero._global_grad_norm = norm / zero.loss_scale
        zero.overflow = zero.dtype == torch.float16 and not bool(torch.isfinite(norm))

    def _keep(self, set_to_none: bool = True) -> None:
        """In place of ``zero_grad``, which the engine calls right after ``step``."""
        if not self._waits:
            self._clear(set_to_none=set_to_none)

    def _decide(self, has_overflow: bool = False) -> None:
        """In place of ``_update_scale``, after which ZeRO clears the gradients of an overflow."""
        self._overflow = has_overflow
        self._update_scale(has_overflow)
        if self._drops:
            self._zero.overflow = True


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _norm_method(zero: Any) -> str:
    return "_get_norm_groups" if _is_stage_3(zero) else "scaled_global_norm"


def _norms(zero: Any) -> list[Tensor]:
    """The norm of each group's gradients over all ranks; below 0 where one is not finite."""
    if _is_stage_3(zero):
        return list(zero._get_norm_groups())
    if hasattr(zero, "_wait_for_offload_copies"):
        zero._wait_for_offload_copies()
    groups = [zero.params_in_partition[number] for number in range(len(zero.bit16_groups))]
    if zero.cpu_offload:
        return [zero.complete_grad_norm_calculation_for_cpu_offload(group) for group in groups]
    return [
        zero.get_grad_norm_direct(zero.averaged_gradients[number], group)
        for number, group in enumerate(groups)
    ]


def _joined(parts: list[Tensor]) -> Tensor:
    """The norm of all groups; infinite where one of them is not finite.

    DeepSpeed before 0.19 takes the -1 of such a group for a norm of 1, and makes the update.
    """
    values = torch.stack([torch.as_tensor(part, dtype=torch.float32) for part in parts])
    invalid = (~torch.isfinite(values) | (values < 0)).any()
    norm = torch.linalg.vector_norm(values)
    return torch.where(invalid, torch.full_like(norm, torch.inf), norm)


@relies_on(
    "torch",
    checked=("2.9", "2.13"),
    reason="the lock file of a process that was killed while it compiled makes every other wait "
    "forever",
    uses={"torch.utils.cpp_extension.FileBaton": None},
)
def use_own_locks() -> None:
    """Make torch lock extensions with ``BuildLock``, in this process."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock  # type: ignore[attr-defined,assignment]


class BuildLock:
    """In place of ``torch.utils.file_baton.FileBaton``, whose file it makes, so that the two
    exclude each other. Beside it lies one with a POSIX record lock, which the system releases with
    the process. ``try_acquire`` waits and then succeeds: what a killed process has left unfinished
    is built, where torch would load a file that is not there.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self.path = Path(lock_file_path)
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock; always True."""
        beside = self.path.with_name(self.path.name + ".held")
        self._descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        while not self._create():
            if abandoned(self.path):
                self.path.unlink(missing_ok=True)
                logger.warning(f"{self.path}: left by a process that was killed; removed")
            else:
                time.sleep(LOOK_SECONDS)
        return True

    def release(self) -> None:
        """Let the next one in."""
        assert self._descriptor is not None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as stream:
                stream.write(OURS)
        except FileExistsError:
            return False
        return True


def abandoned(lock: Path) -> bool:
    """Whether a lock's holder is gone, asked by a process that has the lock beside it."""
    try:
        if lock.read_text(encoding="utf-8") == OURS:
            return True
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    return age >= ABANDONED_SECONDS and not processes_holding([lock.resolve()])


@relies_on(
    "deepspeed",
    checked=DEEPSPEED,
    reason="on a CPU ZeRO 3 starts numactl again for each gradient that it divides",
    uses={"deepspeed.utils.numa.get_numa_cores": ()},
)
def run_numactl_once() -> None:
    """Keep what ``numactl`` says."""
    from deepspeed.utils import numa

    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)


@relies_on(
    "transformers",
    checked=("5.17", "5.23"),
    reason="after loading under ZeRO 3 transformers gathers only the weights that it has yet to "
    "initialize, but calls _init_weights for every module: that of sinusoidal positions (FSMT, "
    "Pegasus) computes its table from the shape of the weight, which is empty then",
    uses={"transformers.PreTrainedModel._initialize_missing_keys": ("is_quantized",)},
)
def skip_loaded_modules() -> None:
    """Keep transformers from initializing modules whose weights have all been loaded.

    Nothing else changes: its initializers leave loaded weights alone in any case.
    """
    from transformers import PreTrainedModel

    initialize = PreTrainedModel._initialize_missing_keys

    @functools.wraps(initialize)
    def initialize_missing(model: Any, *args: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
                module._is_hf_initialized = True
        return initialize(model, *args, **kwargs)

    if not hasattr(initialize, "__wrapped__"):
        PreTrainedModel._initialize_missing_keys = initialize_missing  # type: ignore


@relies_on(
    "deepspeed",
    checked=DEEPSPEED,
    reason="transformers' polynomial schedule reads the optimizer's defaults, which ZeRO's wrapper "
    "leaves out",
    uses={STAGE_1_2: None, STAGE_3: None},
)
def give_defaults(zero: Any) -> None:
    """Let ZeRO's optimizer show the ``defaults`` of the one that it wraps."""
    if not hasattr(zero, "defaults"):
        zero.defaults = zero.optimizer.defaults


@relies_on(
    "deepspeed",
    checked=DEEPSPEED,
    reason="ZeRO 1 and 2 link parameters to their state after the first group's first step, when "
    "the other groups have none yet, and never again",
    uses={f"{STAGE_1_2}._lazy_init_hp_params_optimizer_state": ()},
)
def link_state(zero: Any) -> None:
    """Tie each parameter to its part of the optimizer's state, in ZeRO 1 and 2.

    Otherwise only the first group's can be read by parameter.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


@relies_on(
    "deepspeed",
    checked=DEEPSPEED,
    reason="setting a parameter or its state under ZeRO 3 reads past the end of the tensor on the "
    "last rank where the ranks do not divide the number of elements",
    uses={
        "deepspeed.utils.safe_set_full_fp32_param": ("param", "value"),
        "deepspeed.utils.safe_set_full_optimizer_state": ("param", "value", "optim_state_key"),
    },
)
@contextlib.contextmanager
def divisible(parameter: Any, value: Tensor) -> Iterator[Tensor]:
    """``value``, padded so that ZeRO 3 can divide it over the ranks; flat where it is.

    Inside the context the parameter's number of elements is the padded one.
    """
    number, missing = getattr(parameter, "ds_numel", 0), 0
    if number:
        missing = -number % dist.get_world_size(parameter.ds_process_group)
    if not missing:
        yield value
        return
    parameter.ds_numel = number + missing
    try:
        yield F.pad(value.flatten(), (0, missing))
    finally:
        parameter.ds_numel = number
