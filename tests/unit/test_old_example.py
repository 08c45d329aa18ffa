"""The old seq2seq trainer's example, with only its import line changed, on a tiny BART."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.support import old_finetuning
from tests.support.copying import write_copy_task
from tests.support.families import tiny_folder

STEPS, WARMUP, RATE = 60, 10, 2e-3
FLAGS = f"""
    --label_smoothing 0.1 --predict_with_generate --lr_scheduler cosine --warmup_steps {WARMUP}
    --sortish_sampler --dropout 0.05 --attention_dropout 0.02 --max_steps {STEPS}
    --learning_rate {RATE} --per_device_train_batch_size 16 --per_device_eval_batch_size 7
    --max_source_length 16 --max_target_length 14 --val_max_target_length 12
    --test_max_target_length 12 --eval_beams 2 --logging_steps 1 --save_strategy no
    --report_to none --disable_tqdm True --use_cpu --do_train --do_eval --do_predict
""".split()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(folder, trainer, output of predict) of one run of the script."""
    folder = tmp_path_factory.mktemp("old")
    data = write_copy_task(folder / "data", {"train": 400, "val": 30, "test": 25})
    texts = (data / "train.source").read_text().splitlines()
    tiny_folder("bart", folder / "new", texts=texts)
    places = ("--model_name_or_path", folder / "new", "--data_dir", data)
    words = [*map(str, places), "--output_dir", str(folder / "run"), *FLAGS]
    trainer, test = old_finetuning.main(words)
    return folder, trainer, test


def test_it_trains_under_its_old_flags(example):
    _, trainer, _ = example
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS == trainer.state.global_step
    assert sum(e["loss"] for e in logs[-5:]) < 0.6 * sum(e["loss"] for e in logs[:5])
    assert all(entry["loss"] != entry["nll_loss"] for entry in logs)  # smoothed, and plain
    for done, entry in enumerate(logs):
        share = (done - WARMUP) / (STEPS - WARMUP)
        factor = done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * share))
        assert entry["learning_rate"] == pytest.approx(RATE * factor, rel=1e-6)
    assert trainer.model.config.dropout == 0.05
    assert trainer._get_train_sampler().mode == "sortish"


def test_it_evaluates_with_its_metrics(example):
    folder, trainer, test = example
    results = json.loads((folder / "run/all_results.json").read_text())
    names = {f"{s}_{n}" for s in ("val", "test") for n in ("loss", "nll_loss", "bleu", "gen_len")}
    assert names <= set(results) and {"train_loss", "train_runtime"} <= set(results)
    assert 0 < results["val_gen_len"] <= 12 and 0 <= results["val_bleu"] <= 100
    assert test.predictions.shape == test.label_ids.shape == (25, 12)  # padded to the limit

    # label ids come back in data order, and the metrics are those of the texts written
    tokenizer = trainer.processing_class
    references = (folder / "data/test.target").read_text().splitlines()
    decoded = tokenizer.batch_decode(test.label_ids, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == references
    written = (folder / "run/test_generations.txt").read_text().splitlines()
    bleu = old_finetuning.sacrebleu.corpus_bleu(written, [references]).score
    assert results["test_bleu"] == pytest.approx(bleu, abs=1e-3)


def test_its_evaluation_loss_is_the_smoothed_loss_per_token(example):
    """Against torch's cross entropy, row by row, on the model as saved."""
    folder, _, _ = example
    results = json.loads((folder / "run/all_results.json").read_text())
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    lines = (folder / "data/val.source").read_text().splitlines()
    total, nll, tokens = 0.0, 0.0, 0
    for line in lines:
        ids = tokenizer([line], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, labels=ids).logits[0].double()
        entropy = torch.nn.functional.cross_entropy
        total += float(entropy(logits, ids[0], reduction="sum", label_smoothing=0.1))
        nll += float(entropy(logits, ids[0], reduction="sum"))
        tokens += ids.shape[1]
    assert len(lines) == 30 and total > nll
    assert results["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert results["val_nll_loss"] == pytest.approx(nll / tokens, rel=1e-5)
