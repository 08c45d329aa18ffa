"""What must be the same for a run to go on exactly, and what to say where it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_scale.errors import UserError

Identity = Mapping[str, Mapping[str, Any]]
"""One of ``config.CHANGES`` -> name of a setting -> value, as JSON holds it."""

CONSEQUENCES = {
    "data": "weights, optimizer and schedule are kept; the new data's batch plan is entered at the "
    "same step, so rows of its steps before that wait for the next epoch",
    "tokenizer": "weights, optimizer and position are kept; token ids may mean other text",
    "seed": "weights, optimizer and schedule are kept; the batch plan and dropout are those of the "
    "new seed from here on, so rows may come twice or not at all in this epoch",
    "step_size": "weights, optimizer and schedule are kept; the batch plan is cut anew and entered "
    "at the same step, so rows may come twice or not at all in this epoch",
    "loss": "everything is kept; the loss is another from here on",
    "optimizer": "weights and schedule are kept; moments are kept for the same kind of optimizer, "
    "else they restart from nothing",
    "schedule": "weights, optimizer and step are kept; the new schedule is entered at that step",
}
"""What accepting a change means for the run."""


def differences(saved: Identity, now: Identity) -> list[tuple[str, str, Any, Any]]:
    """(change, setting, value in the checkpoint, value now) for all that differ.

    Settings that only one of the two knows (another version wrote it) are not compared.
    """
    now = json.loads(json.dumps(now, default=str))  # as the other one was written
    return [
        (change, name, saved[change][name], value)
        for change, values in now.items()
        for name, value in values.items()
        if name in saved.get(change, {}) and saved[change][name] != value
    ]


def check_identity(
    folder: Path, saved: Identity, now: Identity, accepted: Sequence[str]
) -> list[str]:
    """Compare a checkpoint's run with this one; a line for each accepted change.

    Raises:
        UserError: there are differences that are not accepted; one line for each, with both values
            and the flag that accepts it.
    """
    found = differences(saved, now)
    refused = [entry for entry in found if entry[0] not in accepted]
    if refused:
        wanted = " ".join(dict.fromkeys([*accepted, *(change for change, *_ in refused)]))
        raise UserError(
            *(
                f"{name}: {_shown(now_value)} now, but {_shown(value)} in {folder}; give the old "
                f"value, or accept it with --accept_changes {wanted} ({CONSEQUENCES[change]})"
                for change, name, value, now_value in refused
            )
        )
    changes = dict.fromkeys(change for change, *_ in found)
    return [f"{change} has changed, as accepted: {CONSEQUENCES[change]}" for change in changes]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
