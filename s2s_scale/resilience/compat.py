"""Private parts of torch and of Python that watching and stopping ranks needs."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

from s2s_scale.compat import relies_on


@relies_on(
    "torch",
    checked=("2.9", "2.13"),
    reason="before it had --signals-to-handle, torchrun always took SIGTERM and SIGINT over",
    uses={
        "torch.distributed.elastic.multiprocessing.api._terminate_process_handler": [
            "signum",
            "frame",
        ]
    },
)
def keep_from_torchrun(signals: Collection[int]) -> None:
    """Make torchrun ignore ``signals``; it sets its own handlers when it starts the ranks."""
    from torch.distributed.elastic.multiprocessing import api

    module: Any = api
    ending = module._terminate_process_handler

    def handler(number: int, frame: FrameType | None) -> None:
        if number not in signals:
            ending(number, frame)

    module._terminate_process_handler = handler


def current_frame(thread: int) -> FrameType | None:
    """What a thread of this process is doing; None if there is no such thread.

    ``sys._current_frames`` is documented in spite of its name, and there is no other way.
    """
    return sys._current_frames().get(thread)
