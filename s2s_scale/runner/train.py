"""``train`` and ``evaluate``: cheap checks first, then the data, then the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2s_scale.backends import Backend
from s2s_scale.checkpoint import (
    STATE_FILE,
    DamagedCheckpoint,
    check_writable,
    locked,
    newest_verified,
    refuse_earlier_run,
    remove_earlier_run,
    remove_partial,
    resolve_resume,
)
from s2s_scale.checkpoint.atomic import writing
from s2s_scale.checkpoint.portable import SETTINGS, read_json
from s2s_scale.data.plan_summary import shape_rows
from s2s_scale.data.sources import Split, has_split, load_pairs
from s2s_scale.data.streaming import open_stream
from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.evaluation.metrics import TextMetrics
from s2s_scale.report.results import Results, print_table, write_run_report
from s2s_scale.resilience.reports import RUN_VARIABLE
from s2s_scale.runner.build import (
    Run,
    build_trainer,
    load_model,
    open_backend,
    read_settings,
    stream_examples,
    tokenize,
)
from s2s_scale.settings import Settings
from s2s_scale.trainer import Seq2SeqTrainer
from s2s_scale.trainer.bad_steps import NonFiniteLossError
from s2s_scale.trainer.streaming import streaming_problems
from s2s_scale.utils import remove_if_empty

T = TypeVar("T")


def train(settings: Settings) -> int:
    """Train, then evaluate on val and test if requested; returns the exit code.

    Raises:
        UserError: for whatever the user can correct. An earlier run is deleted only on request,
            and only after everything that can be checked has been.
    """
    with open_backend(settings) as backend, ExitStack() as stack:
        run = read_settings(settings, backend, trains=True)
        args = run.training_args
        resume = on_main(backend, lambda: _resume(args.resume_from_checkpoint, run.output_dir))
        if resume is None and not args.overwrite_output_dir:
            refuse_earlier_run(run.output_dir)
        stack.callback(remove_if_empty, run.output_dir)
        check_writable(run.output_dir)
        stack.enter_context(one_run(backend, run.output_dir))
        _check_best_metric(run)
        if run.data_args.streaming:
            raise_problems(streaming_problems(args, static_shapes=backend.static_shapes))
        stream = open_stream(run.data_args) if run.data_args.streaming else None
        splits = [s for s in _splits_of_training(run) if stream is None or s != "train"]
        pairs = {split: load_pairs(run.data_args, split) for split in splits}
        loaded = load_model(run)
        examples: dict[Split, Any] = {
            split: tokenize(run, loaded, backend, pairs[split], split) for split in pairs
        }
        if stream is not None:
            examples["train"] = stream_examples(run, loaded, stream)
        trainer = build_trainer(run, loaded, backend, examples)
        if resume is None:
            trainer.add_callback(RemoveEarlierRun(run.output_dir))
        stack.callback(trainer.parts.checkpointer.wait)
        on_main(backend, lambda: remove_partial(run.output_dir))
        return _train(run, trainer, examples, resume)


def evaluate(settings: Settings) -> int:
    """Evaluate a saved model on ``--split``; writes result files only with ``--output_dir``."""
    split: Split = settings.options.split
    with open_backend(settings) as backend, TemporaryDirectory() as scratch:
        keep = settings.get("output_dir") is not None
        extra = {"predict_with_generate": True} | ({} if keep else {"output_dir": scratch})
        run = read_settings(settings, backend, extra, trains=False)
        if keep:
            check_writable(run.output_dir)
        pairs = load_pairs(run.data_args, split)
        loaded = load_model(run)
        examples = {split: tokenize(run, loaded, backend, pairs, split)}
        trainer = build_trainer(run, loaded, backend, examples)
        results = Results()
        metrics = trainer.evaluate(examples[split], metric_key_prefix=split)
        results.add(split, metrics, run.texts.get(split))
        if backend.collectives.rank == 0:
            print_table(results, title=f"{run.model_args.model_name_or_path} on {split}")
            if keep:
                print(f"results: {results.write(run.output_dir, split)}")
    return 0


def _resume(value: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: after a restart this run's own, else the one requested."""
    run_id = os.environ.get(RUN_VARIABLE)

    def own(folder: Path) -> bool:
        try:
            return bool(read_json(folder / SETTINGS).get("run") == run_id)
        except (OSError, DamagedCheckpoint):
            return False

    found = None
    if run_id and (found := newest_verified(output_dir, print_note, among=own)):
        print_note(f"resuming from {found}")
    return found or resolve_resume(value, output_dir, print_note)


def _check_best_metric(run: Run) -> None:
    """``--metric_for_best_model`` must be a metric that the evaluations compute."""
    args, name = run.training_args, run.training_args.metric_for_best_model
    if name is None:
        return
    known = ["loss", "nll_loss"]
    if args.predict_with_generate:
        known += ["gen_len", *TextMetrics(run.data_args.metrics).result()]
    if name.removeprefix("eval_") not in known:
        raise unknown_name("metric_for_best_model", name, known)


def _splits_of_training(run: Run) -> list[Split]:
    """The train split, and those needed to evaluate during and after training.

    Raises:
        UserError: the data lack a split that is needed.
    """
    args = run.training_args
    reasons: dict[Split, list[str]] = {
        "train": ["training"],
        "val": [
            flag
            for flag, on in (
                ("--eval_strategy", args.evaluates_while_training),
                ("--do_eval", args.do_eval),
            )
            if on
        ],
        "test": ["--do_predict"] if args.do_predict else [],
    }
    needed: list[Split] = [split for split, why in reasons.items() if why]
    raise_problems(
        [
            f"{reasons[split][0]} needs the {split} split, which the data do not have; add it or "
            "omit the flag"
            for split in needed
            if split != "train" and not has_split(run.data_args, split)
        ]
    )
    return needed


class RemoveEarlierRun(TrainerCallback):
    """Deletes an earlier run when training begins, after every check has passed.

    Optimizer, schedule and data loaders are created by ``Trainer.train``, which may still reject
    settings.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # With an automatic batch size, training begins again after running out of memory.
        if state.is_world_process_zero and not self._done:
            remove_earlier_run(self.output_dir)
        self._done = True


def _train(
    run: Run,
    trainer: Seq2SeqTrainer,
    examples: dict[Split, Any],
    resume: Path | None,
) -> int:
    """Train, save, evaluate, and write results and report."""
    output_dir = run.output_dir
    began = None if resume is None else read_json(resume / STATE_FILE).get("global_step")
    try:
        outcome = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except NonFiniteLossError as error:
        trainer.log({"nonfinite_steps": error.count})
        with writing("the log", output_dir):
            trainer.state.save_to_json(str(output_dir / STATE_FILE))
        raise
    trainer.save_model()
    trained = outcome.metrics
    if trainer.state.global_step == began:
        print_note(
            f"{resume} is the end of training: no step is left; raise --max_steps to train longer"
        )
        trained = {}
    with writing("the results", output_dir):
        _finish(run, trainer, examples, trained)
    return 0


def _finish(
    run: Run,
    trainer: Seq2SeqTrainer,
    examples: dict[Split, Any],
    train_metrics: dict[str, float],
) -> None:
    """Evaluate the requested splits, and write results and report.

    ``train_metrics``: empty if no step was made, so that an earlier command's results are kept.
    """
    results, output_dir = Results(), run.output_dir
    main = trainer.backend.collectives.rank == 0
    if train_metrics:
        results.add("train", train_metrics, None)
        if main:
            results.write(output_dir, "train")
    after: dict[Split, bool] = {
        "val": run.training_args.do_eval,
        "test": run.training_args.do_predict,
    }
    for split, wanted in after.items():
        if wanted:
            metrics = trainer.evaluate(examples[split], metric_key_prefix=split)
            results.add(split, metrics, run.texts.get(split))
            if main:
                results.write(output_dir, split)
    if not main:
        return
    trainer.state.save_to_json(str(output_dir / STATE_FILE))
    planned = trainer.parts.loaders.plan_summary()
    html, png = write_run_report(
        output_dir,
        title=f"Training run {output_dir.name}",
        history=trainer.state.log_history,
        results=results,
        settings=run.given,
        shapes=[] if planned is None else shape_rows(planned),
        bad_steps=trainer.parts.bad_steps.table(),
    )
    print_table(results, title=f"results in {output_dir}")
    print(f"model:   {output_dir}\nreport:  {html}\npicture: {png}")


@contextmanager
def one_run(backend: Backend, folder: Path) -> Iterator[None]:
    """Hold the output folder's lock on rank 0; every rank must enter.

    Raises:
        UserError: another run writes to the folder; on every rank.
    """
    with ExitStack() as stack:
        on_main(backend, lambda: stack.enter_context(locked(folder)))
        yield


def on_main(backend: Backend, find: Callable[[], T]) -> T:
    """Call ``find`` on rank 0 and return its result, or raise its ``UserError``, on every rank."""
    found: T | None = None
    problems: tuple[str, ...] = ()
    if backend.collectives.rank == 0:
        try:
            found = find()
        except UserError as error:
            problems = error.problems
    found, problems = backend.collectives.gather_objects((found, problems))[0]
    raise_problems(problems)
    return cast("T", found)


def print_note(text: str) -> None:
    """Print a note to standard error."""
    print(f"note: {text}", file=sys.stderr)
