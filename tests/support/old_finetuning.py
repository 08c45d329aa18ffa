"""A fine-tuning script in the manner of transformers' old examples/legacy/seq2seq.

Everything but the import marked below is as such scripts had it: flags under their old names,
rows padded to full length, a collator that makes decoder inputs and pads labels with the pad id,
metrics from decoded predictions and label ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sacrebleu
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    set_seed,
)
from transformers.models.bart.modeling_bart import shift_tokens_right

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments  # the line that changed


@dataclass
class ModelArguments:
    model_name_or_path: str


@dataclass
class DataTrainingArguments:
    data_dir: str
    max_source_length: int | None = field(default=1024)
    max_target_length: int | None = field(default=128)
    val_max_target_length: int | None = field(default=142)
    test_max_target_length: int | None = field(default=142)
    n_train: int | None = field(default=-1)
    n_val: int | None = field(default=-1)
    eval_beams: int | None = field(default=None)
    ignore_pad_token_for_loss: bool = field(default=True)


class PaddedRows(torch.utils.data.Dataset):
    """A split's rows, each padded to the maximal length."""

    def __init__(self, tokenizer, data_dir, split, *, max_source_length, max_target_length):
        self.tokenizer = tokenizer
        self.sources = (Path(data_dir) / f"{split}.source").read_text().splitlines()
        self.targets = (Path(data_dir) / f"{split}.target").read_text().splitlines()
        self.limits = max_source_length, max_target_length

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index):
        source = self.encode(self.sources[index], self.limits[0])
        target = self.encode(self.targets[index], self.limits[1])
        return {
            "input_ids": source["input_ids"][0],
            "attention_mask": source["attention_mask"][0],
            "labels": target["input_ids"][0],
        }

    def encode(self, line, limit):
        return self.tokenizer(
            [line], max_length=limit, padding="max_length", truncation=True, return_tensors="pt"
        )


class Collator:
    """Stacks rows without the columns that are pads alone."""

    def __init__(self, tokenizer, decoder_start_token_id):
        self.pad = tokenizer.pad_token_id
        self.start = decoder_start_token_id

    def __call__(self, rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        source_used = batch["input_ids"].ne(self.pad).any(dim=0)
        target_used = batch["labels"].ne(self.pad).any(dim=0)
        labels = batch["labels"][:, target_used]
        return {
            "input_ids": batch["input_ids"][:, source_used],
            "attention_mask": batch["attention_mask"][:, source_used],
            "decoder_input_ids": shift_tokens_right(labels, self.pad, self.start),
            "labels": labels,
        }


def build_compute_metrics(tokenizer):
    def compute_metrics(prediction):
        labels = prediction.label_ids
        labels[labels == -100] = tokenizer.pad_token_id
        texts = tokenizer.batch_decode(prediction.predictions, skip_special_tokens=True)
        references = tokenizer.batch_decode(labels, skip_special_tokens=True)
        lengths = [
            np.count_nonzero(row != tokenizer.pad_token_id) for row in prediction.predictions
        ]
        return {
            "bleu": round(sacrebleu.corpus_bleu(texts, [references]).score, 4),
            "gen_len": np.round(np.mean(lengths), 1),
        }

    return compute_metrics


def main(argv):
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)

    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    for name in ("encoder_layerdrop", "decoder_layerdrop", "dropout", "attention_dropout"):
        if getattr(training_args, name, None):
            assert hasattr(config, name)
            setattr(config, name, getattr(training_args, name))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config)

    def rows(split, limit):
        return PaddedRows(
            tokenizer,
            data_args.data_dir,
            split,
            max_source_length=data_args.max_source_length,
            max_target_length=limit,
        )

    trainer = Seq2SeqTrainer(
        model=model,
        config=config,
        args=training_args,
        data_args=data_args,
        train_dataset=rows("train", data_args.max_target_length),
        eval_dataset=rows("val", data_args.val_max_target_length),
        data_collator=Collator(tokenizer, config.decoder_start_token_id),
        compute_metrics=build_compute_metrics(tokenizer),
        tokenizer=tokenizer,
    )
    all_metrics = dict(trainer.train().metrics)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(Path(training_args.output_dir) / "trainer_state.json"))
        tokenizer.save_pretrained(training_args.output_dir)
    all_metrics.update(trainer.evaluate(metric_key_prefix="val"))
    test = trainer.predict(
        test_dataset=rows("test", data_args.test_max_target_length), metric_key_prefix="test"
    )
    all_metrics.update(test.metrics)
    texts = tokenizer.batch_decode(test.predictions, skip_special_tokens=True)
    text = "".join(f"{line.strip()}\n" for line in texts)
    (Path(training_args.output_dir) / "test_generations.txt").write_text(text)
    (Path(training_args.output_dir) / "all_results.json").write_text(json.dumps(all_metrics))
    return trainer, test
