"""Checkpoints: one documented format for every backend, written whole or not at all, verified.

Loading this package imports no torch; ``checkpoint.portable`` and ``checkpoint.tensors`` do.
"""

from __future__ import annotations

from s2s_scale.checkpoint.atomic import SINGLE, Ranks, whole_files, whole_folder, writing
from s2s_scale.checkpoint.manager import (
    CHECKPOINT_NAME,
    RUN_FILES,
    STATE_FILE,
    TRAINING_STATE,
    WEIGHT_FILES,
    check_whole,
    check_writable,
    checkpoints,
    earlier_run,
    is_ours,
    last_checkpoint_text,
    newest_verified,
    refuse_earlier_run,
    remove_earlier_run,
    resolve_resume,
    rotate,
    tidy,
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
    "check_whole",
    "check_writable",
    "checkpoints",
    "earlier_run",
    "is_ours",
    "last_checkpoint_text",
    "newest_verified",
    "read_manifest",
    "refuse_earlier_run",
    "remove_earlier_run",
    "resolve_resume",
    "rotate",
    "tidy",
    "verify",
    "whole_files",
    "whole_folder",
    "write_manifest",
    "writing",
]
