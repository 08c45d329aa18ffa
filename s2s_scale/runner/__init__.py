"""The composition root: one function per verb, which builds what the verb needs and runs it."""

from __future__ import annotations

from s2s_scale.runner.generate import generate
from s2s_scale.runner.plan import new_model, plan
from s2s_scale.runner.train import evaluate, train

__all__ = ["evaluate", "generate", "new_model", "plan", "train"]
