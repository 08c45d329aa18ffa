"""Creates a new model and tokenizer of one of six architectures from the user's texts."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_scale.config import DataArguments
from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.models.families import FAMILIES
from s2s_scale.models.tokenizers import TokenizerSettings, train_tokenizer
from s2s_scale.utils import as_any_new_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ARCHITECTURES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian")
SIZES = ("tiny", "small", "base")
#: maximum length of generated texts (transformers' own default is 20 tokens)
GENERATION_MAX_LENGTH = 200
#: standard deviation of T5's relative position biases in a new model
RELATIVE_POSITION_STD = 2.5


@dataclass(frozen=True)
class Shape:
    """Width, feed-forward width, attention heads, and layers of encoder and of decoder."""

    d_model: int
    ffn: int
    heads: int
    layers: int
    positions: int = 1024


_TINY = Shape(d_model=128, ffn=512, heads=4, layers=2)
_SMALL = Shape(d_model=256, ffn=1024, heads=4, layers=4)
#: ``base`` is the published base shape: bart-base, t5-base, the Pegasus paper's base, opus-mt and
#: wmt16-en-de (transformer base); mBART was published in one size only and takes bart-base's here
SHAPES: dict[str, dict[str, Shape]] = {
    "bart": {"tiny": _TINY, "small": _SMALL, "base": Shape(768, 3072, 12, 6)},
    "t5": {"tiny": _TINY, "small": _SMALL, "base": Shape(768, 3072, 12, 12)},
    "mbart": {"tiny": _TINY, "small": _SMALL, "base": Shape(768, 3072, 12, 6)},
    "fsmt": {"tiny": _TINY, "small": _SMALL, "base": Shape(512, 2048, 8, 6)},
    "pegasus": {"tiny": _TINY, "small": _SMALL, "base": Shape(768, 3072, 12, 12)},
    "marian": {"tiny": _TINY, "small": _SMALL, "base": Shape(512, 2048, 8, 6)},
}
#: what the published models of a family set besides their shape. mBART's scaled embeddings are left
#: out: new position embeddings are too small beside them to learn word order from (copying, 300
#: steps: 63 to 94 % of rows exact with the scale, 100 % without)
PUBLISHED: dict[str, dict[str, Any]] = {
    "bart": {"activation_function": "gelu"},
    "t5": {"feed_forward_proj": "relu"},
    "mbart": {"activation_function": "gelu", "scale_embedding": False},
    "fsmt": {"activation_function": "relu", "scale_embedding": True, "tie_word_embeddings": True},
    "pegasus": {"activation_function": "relu", "scale_embedding": True},
    "marian": {"activation_function": "swish", "scale_embedding": True},
}


def new_model(
    *,
    architecture: str,
    size: str,
    texts: Iterable[str],
    vocab_size: int,
    output_dir: str | Path,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    seed: int = 0,
    split_digits: bool = True,
    overwrite: bool = False,
) -> Path:
    """Train a tokenizer on ``texts`` (source and target rows) and save it with a new model.

    The folder can be loaded with ``AutoModelForSeq2SeqLM`` and ``AutoTokenizer``. The same
    arguments give the same files. The folder appears once it is complete.

    Args:
        architecture: one of ``ARCHITECTURES``.
        size: one of ``SIZES``.
        texts: source and target rows.
        vocab_size: largest number of tokens, special ones included.
        output_dir: folder to write to.
        src_lang: source language code, for mBART and FSMT.
        tgt_lang: target language code.
        seed: of the weights and of the tokenizer's sample of texts.
        split_digits: make every digit a token.
        overwrite: replace files of the same names in a folder that is not empty.

    Raises:
        UserError: a name is unknown, the vocabulary is too small for the texts, there is no text,
            or the folder is not empty and ``overwrite`` is not given.
    """
    from transformers import CONFIG_MAPPING

    output_dir = Path(output_dir)
    check_request(architecture, size, vocab_size, output_dir, overwrite=overwrite)
    if architecture == "mbart":
        src_lang, tgt_lang = src_lang or "en_XX", tgt_lang or "de_DE"
    with _staged(output_dir) as folder:
        # AutoTokenizer reads the family from a config.json.
        CONFIG_MAPPING[architecture]().save_pretrained(folder)
        settings = TokenizerSettings(vocab_size, folder, src_lang, tgt_lang, seed, split_digits)
        tokenizer = train_tokenizer(architecture, texts, settings)
        config = fresh_config(architecture, size, tokenizer)
        _write_model(config, tokenizer, folder, seed=seed, languages=(src_lang, tgt_lang))
    return output_dir


def check_request(
    architecture: str, size: str, vocab_size: int, output_dir: Path, *, overwrite: bool
) -> None:
    """Raise one ``UserError`` for all invalid arguments of ``new_model``."""
    problems: list[str] = []
    if architecture not in FAMILIES:
        problems += unknown_name("architecture", architecture, ARCHITECTURES).problems
    if size not in SIZES:
        problems += unknown_name("size", size, SIZES).problems
    if vocab_size < 1:
        problems.append(f"vocab_size={vocab_size}: expected a positive number, such as 8000")
    if output_dir.exists() and not output_dir.is_dir():
        problems.append(f"{output_dir}: expected a folder to write to, found a file")
    elif output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        problems.append(
            f"{output_dir}: the folder is not empty; choose another --output_dir or give "
            "--overwrite"
        )
    raise_problems(problems)


def fresh_config(
    architecture: str, size: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config of a new model of an architecture and size for ``tokenizer``."""
    from transformers import CONFIG_MAPPING

    shape = SHAPES[architecture][size]
    fields = _t5_fields(shape) if architecture == "t5" else _bart_like_fields(shape)
    config_class = CONFIG_MAPPING[architecture]
    values = {**fields, **PUBLISHED[architecture], **_token_fields(architecture, tokenizer)}
    return config_class(**values)


def run_new_model(
    *,
    architecture: str,
    size: str,
    data: DataArguments,
    vocab_size: int,
    output_dir: str | Path,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    seed: int = 0,
    split_digits: bool = True,
    overwrite: bool = False,
) -> Path:
    """``new_model`` on the training split that ``data`` names, with its source prefix.

    Language codes default to those of ``data``. Raises the ``UserError``s of ``new_model`` and of
    ``load_pairs``.
    """
    from s2s_scale.data.sources import load_pairs

    check_request(architecture, size, vocab_size, Path(output_dir), overwrite=overwrite)
    pairs = load_pairs(data, "train")
    prefix = data.source_prefix or ""

    def texts() -> Iterator[str]:
        for source in pairs["source"]:
            yield prefix + source
        yield from pairs["target"]

    return new_model(
        architecture=architecture,
        size=size,
        texts=texts(),
        vocab_size=vocab_size,
        output_dir=output_dir,
        src_lang=src_lang or data.src_lang,
        tgt_lang=tgt_lang or data.tgt_lang,
        seed=seed,
        split_digits=split_digits,
        overwrite=overwrite,
    )


class _staged:
    """A scratch folder beside ``target``, whose files are moved there if the block succeeds."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.name}.")
        except OSError as error:
            raise UserError(
                f"{self.target}: cannot write there ({error.strerror}); choose another --output_dir"
            ) from error
        self.scratch = Path(scratch)
        return self.scratch

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.target.mkdir(exist_ok=True)
                for file in self.scratch.iterdir():
                    as_any_new_file(file, folder=self.target)
                    file.replace(self.target / file.name)
        finally:
            shutil.rmtree(self.scratch)


def _write_model(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    languages: tuple[str | None, str | None],
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from s2s_scale.models import set_languages

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(config)
        # transformers draws T5's position biases, its only sense of word order, with a deviation of
        # 1/sqrt(d_model), which training from scratch takes long to outgrow: copying, 300 steps,
        # 8 % of rows exact with 0.09 and over 90 % with 2.5.
        for name, parameter in model.named_parameters():
            if name.endswith("relative_attention_bias.weight"):
                torch.nn.init.normal_(parameter, std=RELATIVE_POSITION_STD)
    model.generation_config.max_length = GENERATION_MAX_LENGTH
    set_languages(model, tokenizer, src_lang=languages[0], tgt_lang=languages[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _token_fields(architecture: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary size and special ids, as the published models of the family have them."""
    pad = tokenizer.pad_token_id
    eos = tokenizer.convert_tokens_to_ids("</s>")
    size = len(tokenizer)
    fields: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": eos}
    if architecture == "fsmt":
        langs = [tokenizer.src_lang, tokenizer.tgt_lang]
        fields.update(src_vocab_size=size, tgt_vocab_size=size, langs=langs, num_beams=1)
    else:
        fields["vocab_size"] = size
    if architecture in ("bart", "mbart", "fsmt"):
        fields["bos_token_id"] = tokenizer.convert_tokens_to_ids("<s>")
    if architecture == "mbart":
        return fields  # set_languages makes the target language's code its start token
    start = eos if architecture in ("bart", "fsmt") else pad
    return {**fields, "decoder_start_token_id": start}


def _t5_fields(shape: Shape) -> dict[str, Any]:
    return {
        "d_model": shape.d_model,
        "d_kv": shape.d_model // shape.heads,
        "d_ff": shape.ffn,
        "num_heads": shape.heads,
        "num_layers": shape.layers,
        "num_decoder_layers": shape.layers,
    }


def _bart_like_fields(shape: Shape) -> dict[str, Any]:
    return {
        "d_model": shape.d_model,
        # Xavier's deviation for square matrices. It gives scaled embeddings a magnitude of 1, like
        # the position embeddings. The families' own 0.02 suits a width of 1024 and more; at 128 the
        # positions would drown the words.
        "init_std": shape.d_model**-0.5,
        "max_position_embeddings": shape.positions,
        **{
            f"{side}_{field}": value
            for side in ("encoder", "decoder")
            for field, value in (
                ("layers", shape.layers),
                ("ffn_dim", shape.ffn),
                ("attention_heads", shape.heads),
            )
        },
    }
