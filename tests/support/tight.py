"""One rank of a save in an address space that cannot hold the optimizer's whole state.

A run trains one step, lets the address space grow by ``slack`` bytes at most, and saves; before,
it tries to hold the whole state on every rank at once, which must not fit. It is saved twice: by
both ranks together, and under ``alone`` by rank 0, as where the ranks share no folder.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.fresh import MIB, process_memory
from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, base
from s2s_scale.checkpoint import SaveError
from s2s_scale.checkpoint.tensors import TensorWriter
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.models.tiny import ragged_rows
from s2s_scale.trainer import checkpointing
from tests.support.families import wide_model
from tests.support.limits import limited
from tests.support.training import settings

# Kept, the memory that a step has freed would do for the whole state as well.
base.keep_freed_memory = lambda: False


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a step and save within bounds; sizes, and whether the whole state would have fitted."""
    values = settings(
        folder,
        max_steps=1,
        per_device_train_batch_size=4,
        checkpoint_shard_mib=8,
        **job["arguments"],
    )
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    model = wide_model(job["d_ff"])
    moments = 8 * sum(parameter.numel() for parameter in model.parameters())
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=ragged_rows(model, 16),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
    )
    trainer.train()
    settle()
    with limited(resource.RLIMIT_AS, process_memory("VmSize") + job["slack_mib"] * MIB):
        collected = fits_at_once(moments)
        trainer._save_checkpoint(trainer.model, trial=None)
        with patch.object(checkpointing, "seen_by_all", lambda *_, **__: False):
            trainer.args.output_dir = str(folder / "alone")
            trainer._save_checkpoint(trainer.model, trial=None)
    trainer.args.output_dir = str(folder / "full")
    refused_on_every_rank(trainer)
    return {"moments": moments, "slack": job["slack_mib"] * MIB, "collected": collected}


def settle(*, seconds: float = 10) -> None:
    """Wait until threads that have done their work are gone, and their memory with them."""
    gc.collect()
    deadline, size = time.monotonic() + seconds, 0
    while size != (size := process_memory("VmSize")) and time.monotonic() < deadline:
        time.sleep(0.5)


def refused_on_every_rank(trainer: Seq2SeqTrainer) -> None:
    """The last rank's disk is full: no rank takes the save for done, and nothing is left."""
    backend, folder = trainer.backend, Path(trainer.args.output_dir)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    here = backend.collectives.rank == backend.collectives.world_size - 1
    with (
        patch.object(TensorWriter, "add", full if here else TensorWriter.add),
        pytest.raises(SaveError, match=os.strerror(errno.ENOSPC)),
    ):
        trainer._save_checkpoint(trainer.model, trial=None)
    backend.collectives.gather_objects(None)
    assert list(folder.iterdir()) == []


def fits_at_once(count: int) -> bool:
    """Whether this process could hold so many more bytes."""
    try:
        bytearray(count // 2)  # the half that another rank has
    except MemoryError:
        return False
    return True
