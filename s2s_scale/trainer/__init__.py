"""``Seq2SeqTrainer``: transformers' trainer with a loss, batches and an evaluation of our own.

The class is one, in a chain of files by subject, each overriding transformers' hooks of that
subject: ``base`` (construction) <- ``loss`` <- ``optimization`` <- ``batches`` <- ``evaluating``
<- ``graphs`` <- ``position`` <- ``saving`` <- ``resuming`` <-
``rolling_back`` <- ``stopping``. Beside them stand the
pieces that the hooks use: ``callbacks``, ``compilations``, ``loaders``, ``meters``, ``nonfinite``
and ``randomness``.
"""

from __future__ import annotations

from s2s_scale.trainer.stopping import StoppingTrainer


class Seq2SeqTrainer(StoppingTrainer):
    """Trains encoder-decoder models so that a step's loss depends on its rows and on nothing else.

    Args:
        config: the model's configuration; by default ``model.config``.
        data_args: any object; read are ``ignore_pad_token_for_loss``, ``val_max_target_length``
            and ``eval_beams``, where it has them.
        *args, **kwargs: those of transformers' ``Seq2SeqTrainer`` (``model``, ``args``,
            ``train_dataset`` …). ``tokenizer`` is another name of ``processing_class``.
        backend: what carries the steps onto the hardware; by default one process.
        text_evaluation_for: called for each evaluation with ``predict_with_generate``; texts then
            go to the object it returns and no token array is kept.

    The loss has three modes: label-smoothed NLL where ``label_smoothing`` is not 0; cross entropy
    without pads where ``data_args.ignore_pad_token_for_loss`` is true; else the model's own loss.

    Raises:
        ValueError: no config can be had; the loss needs a pad token id that is not there.
    """


__all__ = ["Seq2SeqTrainer"]
