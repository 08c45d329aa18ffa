"""Progress bars and one readable line per log, in place of transformers' printed dictionaries."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Name in the log -> (label, format); in the order in which they are shown.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "nll_loss": ("nll", "{:.4f}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "bleu": ("BLEU", "{:.2f}"),
    "chrf": ("chrF", "{:.2f}"),
    "rougeL": ("ROUGE-L", "{:.2f}"),
    "exact_match": ("exact match %", "{:.2f}"),
    "overflow_steps": ("overflow steps", "{:.0f}"),
    "nonfinite_steps": ("non-finite steps", "{:.0f}"),
    "loss_spikes": ("loss spikes", "{:.0f}"),
}


def log_line(step: int, logs: dict[str, Any]) -> str | None:
    """``step 100  loss 2.3100  …``; evaluations are marked; None for a log with none of these."""
    evaluation = any(name.endswith("_loss") and name.split("_")[0] == "eval" for name in logs)
    prefix = "eval_" if evaluation else ""
    shown = [
        f"{label} {form.format(float(logs[prefix + name]))}"
        for name, (label, form) in _SHOWN.items()
        if prefix + name in logs
    ]
    if not shown:
        return None
    return "  ".join([f"step {step:>5}" + ("  validation" if evaluation else ""), *shown])


class LineProgressCallback(ProgressCallback):
    """transformers' progress bars, with logs as lines above the training bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        line = log_line(state.global_step, logs or {})
        if line is not None:
            self.training_bar.write(line)
