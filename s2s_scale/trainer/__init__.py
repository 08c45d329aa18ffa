"""Training: ``Seq2SeqTrainer`` and the components that its hooks hand values to."""

from s2s_scale.trainer.trainer import Seq2SeqTrainer

__all__ = ["Seq2SeqTrainer"]
