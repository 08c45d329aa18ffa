"""What can be wrong with a checkpoint, as errors that the user can mend."""

from __future__ import annotations

from s2s_scale.errors import UserError


class SaveError(UserError):
    """Saving failed for a reason outside the program, such as a full disk or a read-only folder."""


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not what its manifest says; names the first file that differs."""
