"""DeepSpeed ZeRO 1, 2 and 3: optimizer state, gradients and parameters sharded over ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from s2s_scale.backends.base import Backend, ParameterState, ReadState, on_host
from s2s_scale.backends.deepspeed.patches import (
    HeldUpdate,
    divisible,
    give_defaults,
    link_state,
    run_numactl_once,
    skip_loaded_modules,
    use_own_locks,
)
from s2s_scale.backends.deepspeed.state import (
    is_whole,
    make_room,
    read_scale,
    state_by_parameter,
    write_scale,
    zero_optimizer,
)
from s2s_scale.errors import raise_problems
from s2s_scale.settings.deepspeed_config import (
    contradictions,
    offloads_optimizer,
    read_config,
    update_can_wait,
    without_sections_of_flags,
    zero_stage,
)
from s2s_scale.utils import free_port


class DeepSpeedBackend(Backend):
    """Training through ``deepspeed.initialize``, which transformers' trainer calls.

    Optimizer and schedule stay ours and are passed to DeepSpeed, so that parameter groups and
    learning rates are those of every other backend.
    """

    name = "deepspeed"
    plain_backward = False
    takes_cpu_functions = False

    def __init__(self, device: str, mesh: Mapping[str, int] | None = None) -> None:
        super().__init__(device, mesh)
        self._config: dict[str, Any] = {}
        self._held: HeldUpdate | None = None

    def problems(self) -> Sequence[str]:
        if find_spec("deepspeed"):
            return super().problems()
        return [
            "backend deepspeed: the package deepspeed is not installed; "
            "pip install 's2s-scale[deepspeed]', or pip install deepspeed",
            *super().problems(),
        ]

    def prepare_process(self) -> None:
        # DeepSpeed looks for a GPU by itself and would take one that the profile leaves alone.
        os.environ.setdefault("DS_ACCELERATOR", self.device)
        if "RANK" not in os.environ:  # DeepSpeed needs a process group even for one process
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(alone, MASTER_PORT=str(free_port()))
        super().prepare_process()
        backend = "nccl" if self.device == "cuda" else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend)
        use_own_locks()
        skip_loaded_modules()
        _own_tools_first()
        import deepspeed

        run_numactl_once()
        # Before a model is built: ZeRO 3 takes the number of ranks from DeepSpeed's own group.
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)

    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        values = dict(values)
        given = values.pop("deepspeed", None)
        config = given if isinstance(given, dict) else read_config(Path(given)) if given else {}
        raise_problems(contradictions(config, values, world_size=self.collectives.world_size))
        self._config = config
        self.can_skip_update = not config or update_can_wait(config)
        # Without an optimizer ZeRO 1 and 2 have nothing to shard.
        if config and (trains or zero_stage(config) == 3):
            values["deepspeed"] = without_sections_of_flags(config)
        return values

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        if offloads_optimizer(self._config) and issubclass(optimizer_class, AdamW):
            return _cpu_adam(groups, options)
        return super().build_optimizer(optimizer_class, groups, options)

    def after_prepare(self, optimizer: Optimizer) -> None:
        zero: Any = getattr(optimizer, "optimizer", optimizer)
        give_defaults(zero)
        if not update_can_wait(self._config):
            self._held = None
        elif self._held is None or not self._held.belongs_to(zero):
            self._held = HeldUpdate(zero, optimizer)

    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        bad_anywhere = super().skip_update_where(optimizer, bad)
        if bad_anywhere and self._held is not None:
            self._held.drop()
        return bad_anywhere

    def whole_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in model.named_parameters()
        }

    def _whole_weight(self, parameter: nn.Parameter, *, wanted: bool) -> Tensor | None:
        """The whole weight, in fp32 where there is a master copy; None on ranks that want none.

        Every rank must call it.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        # A frozen parameter has no master copy, but under ZeRO 3 it is sharded too.
        frozen = master is None and hasattr(parameter, "ds_id")
        with GatheredParameters([parameter], enabled=frozen):
            if not wanted:
                return None
            if master is not None:
                return master
            return parameter.detach().clone() if frozen else parameter.detach()

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = zero_optimizer(optimizer)
        if optimizer is not None and zero is None:
            yield from super().state(model, optimizer, writers)
            return
        if zero is not None:
            link_state(zero)
        flat_states = {} if zero is None else state_by_parameter(zero)
        for name, parameter in model.named_parameters():
            mine = self.collectives.rank == (writers or {}).get(name, 0)
            weight = self._whole_weight(parameter, wanted=mine)
            moments: dict[str, Any] = {}
            for moment, value in flat_states.get(id(parameter), {}).items():
                if is_whole(value):
                    value = safe_get_full_optimizer_state(parameter, moment)
                moments[moment] = value
            if not mine:
                yield ParameterState(name, None, {})
            else:
                moments = {moment: on_host(value) for moment, value in moments.items()}
                yield ParameterState(name, on_host(weight), moments)

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = zero_optimizer(optimizer)
        if zero is None:
            return super().load_state(model, optimizer, read, moments=moments)
        for name, parameter in model.named_parameters():
            weight = read(name, moments=False).weight
            if weight is not None:
                self._set_weight(parameter, weight)
        if not moments:
            return None
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        wanted = {
            id(parameter): {
                moment: None if is_whole(value) else value
                for moment, value in read(name, weight=False).moments.items()
            }
            for name, parameter in trainable.items()
        }
        make_room(zero, wanted)
        for name, parameter in trainable.items():
            for moment, value in read(name, weight=False).moments.items():
                if isinstance(value, Tensor) and is_whole(value):
                    with divisible(parameter, value.float()) as padded:
                        safe_set_full_optimizer_state(parameter, padded, moment)
        return None

    def _set_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set the weight that the model computes with and the optimizer's master copy."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(weight)
        if parameter.requires_grad:
            with divisible(parameter, weight.float()) as padded:
                safe_set_full_fp32_param(parameter, padded)

    def loss_scale(self, optimizer: Any, scaler: Any) -> dict[str, float] | None:
        zero = zero_optimizer(optimizer)
        return None if zero is None else read_scale(zero)

    def load_loss_scale(self, optimizer: Any, scaler: Any, values: Mapping[str, float]) -> None:
        zero = zero_optimizer(optimizer)
        if zero is not None:
            write_scale(zero, values)

    @contextmanager
    def generation(self, model: nn.Module) -> Iterator[Mapping[str, Any]]:
        # Under ZeRO 3 every rank must run every forward pass, also those that have finished.
        yield {"synced_gpus": True} if zero_stage(self._config) == 3 else {}


def _own_tools_first() -> None:
    """Prefer the ninja of this Python environment, even if it is not activated.

    Different versions do not accept each other's build logs: every op would be compiled again
    whenever a run finds another ninja first on PATH.
    """
    beside = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = os.pathsep.join((beside, path))


def _cpu_adam(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
    """AdamW for state that lies in host memory; compiled at its first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    known = {name: options[name] for name in ("lr", "betas", "eps") if name in options}
    return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **known)


def cpu_adam_problem() -> str | None:
    """Why DeepSpeed's CPU Adam cannot be built here; None where it can."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    return None if builder.is_compatible(verbose=False) else "cannot be built"
