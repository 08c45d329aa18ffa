"""The composition root: one function per verb, which builds what the verb needs and runs it."""

from __future__ import annotations

from s2s_scale.runner.creating import new_model
from s2s_scale.runner.generating import generate
from s2s_scale.runner.planning import plan
from s2s_scale.runner.training import evaluate, train

__all__ = ["evaluate", "generate", "new_model", "plan", "train"]
