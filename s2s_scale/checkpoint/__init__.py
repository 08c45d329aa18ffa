"""Checkpoints: one documented format for every backend, written atomically and verified.

Importing this package does not import torch; ``checkpoint.portable`` and ``checkpoint.tensors`` do.
"""

from __future__ import annotations

from s2s_scale.checkpoint.atomic import SINGLE, Ranks, atomic_dir, atomic_files, writing
from s2s_scale.checkpoint.manager import (
    CHECKPOINT_NAME,
    RUN_FILES,
    STATE_FILE,
    TRAINING_STATE,
    WEIGHT_FILES,
    check_intact,
    check_writable,
    checkpoints,
    earlier_run,
    is_ours,
    last_checkpoint_text,
    locked,
    newest_verified,
    refuse_earlier_run,
    remove_earlier_run,
    remove_partial,
    resolve_resume,
    rotate,
)
from s2s_scale.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    SaveError,
    read_manifest,
    verify,
    write_manifest,
)

__all__ = [
    "CHECKPOINT_NAME",
    "MANIFEST",
    "RUN_FILES",
    "SINGLE",
    "STATE_FILE",
    "TRAINING_STATE",
    "WEIGHT_FILES",
    "DamagedCheckpoint",
    "Ranks",
    "SaveError",
    "atomic_dir",
    "atomic_files",
    "check_intact",
    "check_writable",
    "checkpoints",
    "earlier_run",
    "is_ours",
    "last_checkpoint_text",
    "locked",
    "newest_verified",
    "read_manifest",
    "refuse_earlier_run",
    "remove_earlier_run",
    "remove_partial",
    "resolve_resume",
    "rotate",
    "verify",
    "write_manifest",
    "writing",
]
