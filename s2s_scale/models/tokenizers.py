"""Trains a tokenizer of each family on the user's texts.

Source and target share one vocabulary. Four families segment text with a unigram model trained by
sentencepiece, whose pieces are placed between the family's special tokens; BART merges bytes, and
FSMT merges letters of Moses words. Text is not normalised, so that decoding restores it; but T5 and
mBART turn every kind of space into a plain one, and FSMT normalises punctuation.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_scale.errors import UserError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: lines of a training sample, drawn uniformly from all texts; bounds memory and time
MAX_LINES = 1_000_000
#: fixed, since the results of sentencepiece depend on it
SENTENCEPIECE_THREADS = 4
LANGUAGE_CODE = re.compile(r"^>>.+?<<")


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of a new tokenizer. ``vocab_size`` includes special tokens."""

    vocab_size: int
    folder: Path
    src_lang: str | None = None
    tgt_lang: str | None = None
    seed: int = 0
    split_digits: bool = True


def train_tokenizer(
    architecture: str, texts: Iterable[str], settings: TokenizerSettings
) -> PreTrainedTokenizerBase:
    """Train a tokenizer, save it in ``settings.folder`` and return it as loaded from there.

    Its vocabulary is smaller than requested if the texts support no more, with a warning. Raises
    ``UserError`` if there are no texts, the vocabulary is too small for the letters in them, or a
    language code is unknown.
    """
    from transformers import AutoTokenizer

    lines = draw_lines(texts, seed=settings.seed)
    if not lines:
        raise UserError("no text to train a tokenizer on: every row is empty; check the data")
    settings.folder.mkdir(parents=True, exist_ok=True)
    TRAINERS[architecture](lines, settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder)
    if len(tokenizer) < settings.vocab_size:
        logger.warning(
            "The texts support %d tokens of the %d asked for with --vocab_size: the vocabulary "
            "has %d.",
            len(tokenizer),
            settings.vocab_size,
            len(tokenizer),
        )
    return tokenizer


def draw_lines(texts: Iterable[str], *, seed: int, limit: int = MAX_LINES) -> list[str]:
    """A uniform random sample of at most ``limit`` non-empty texts, in arbitrary order."""
    chance = random.Random(seed)
    lines: list[str] = []
    seen = 0
    for text in texts:
        text = text.strip()
        if not text:
            continue
        seen += 1
        if len(lines) < limit:
            lines.append(text)
        elif (place := chance.randrange(seen)) < limit:
            lines[place] = text
    return lines


def _unigram(
    lines: list[str], settings: TokenizerSettings, *, specials: int
) -> tuple[list[tuple[str, float]], bytes]:
    """(piece, log probability) pairs without <unk>, and the serialised sentencepiece model."""
    import sentencepiece

    wanted = settings.vocab_size - specials
    letters = len(set("".join(lines)) | {"▁"} - {" "})
    if wanted < letters:
        raise _too_small(settings.vocab_size, letters + specials)
    sentencepiece.set_random_generator_seed(settings.seed)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=wanted + 1,  # its own <unk>
        model_type="unigram",
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=settings.split_digits,
        hard_vocab_limit=False,
        max_sentence_length=1 << 20,
        num_threads=SENTENCEPIECE_THREADS,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(processor.get_piece_size())
        if not processor.is_unknown(i)
    ]
    return pieces[:wanted], model.getvalue()


def _too_small(vocab_size: int, least: int) -> UserError:
    return UserError(
        f"vocab_size={vocab_size}: too small for the letters in the texts and the special tokens; "
        f"expected at least {least}; give a larger --vocab_size"
    )


def _train_t5(lines: list[str], settings: TokenizerSettings) -> None:
    from transformers import T5Tokenizer

    pieces, _ = _unigram(lines, settings, specials=3)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    # no sentinels: they serve T5's own pre-training only
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(settings.folder)


def _train_mbart(lines: list[str], settings: TokenizerSettings) -> None:
    from transformers import MBartTokenizer
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as CODES

    src_lang, tgt_lang = settings.src_lang or "en_XX", settings.tgt_lang or "de_DE"
    for code in (src_lang, tgt_lang):
        if code not in CODES:
            raise unknown_name("language code", code, CODES)
    pieces, _ = _unigram(lines, settings, specials=5 + len(CODES))
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    last = [(token, 0.0) for token in (*CODES, "<mask>")]
    tokenizer = MBartTokenizer(vocab=[*first, *pieces, *last], src_lang=src_lang, tgt_lang=tgt_lang)
    tokenizer.save_pretrained(settings.folder)


def _train_pegasus(lines: list[str], settings: TokenizerSettings) -> None:
    from transformers import PegasusTokenizer

    pieces, _ = _unigram(lines, settings, specials=5)
    first = [(token, 0.0) for token in ("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>")]
    # offset 2: none of the 101 unused tokens of the published vocabulary
    PegasusTokenizer(vocab=[*first, *pieces], offset=2).save_pretrained(settings.folder)


def _train_marian(lines: list[str], settings: TokenizerSettings) -> None:
    from transformers import MarianTokenizer

    codes = sorted({m.group() for line in lines if (m := LANGUAGE_CODE.match(line))})
    plain = [LANGUAGE_CODE.sub("", line) for line in lines]
    pieces, model = _unigram(plain, settings, specials=3 + len(codes))
    # <pad> comes last, as in the published models: CTranslate2 relies on it
    tokens = ["</s>", "<unk>", *codes, *(piece for piece, _ in pieces), "<pad>"]
    with tempfile.TemporaryDirectory() as scratch:
        spm, vocab = Path(scratch, "joint.spm"), Path(scratch, "vocab.json")
        spm.write_bytes(model)
        vocab.write_text(_json({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        tokenizer = MarianTokenizer(
            source_spm=str(spm),
            target_spm=str(spm),
            vocab=str(vocab),
            source_lang=_plain_language(settings.src_lang, "en"),
            target_lang=_plain_language(settings.tgt_lang, "de"),
        )
        tokenizer.save_pretrained(settings.folder)


def _train_bart(lines: list[str], settings: TokenizerSettings) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BartTokenizer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first, last = ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"]
    least = len(first) + len(alphabet) + len(last)
    if settings.vocab_size < least:
        raise _too_small(settings.vocab_size, least)
    model = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([*_digits(settings), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - len(last),
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(lines, trainer)
    trained = json.loads(model.to_str())["model"]
    vocab = {**trained["vocab"], last[0]: len(trained["vocab"])}
    merges: list[Any] = [tuple(pair) for pair in trained["merges"]]
    tokenizer = BartTokenizer(vocab=vocab, merges=merges)
    tokenizer.save_pretrained(settings.folder)


def _train_fsmt(lines: list[str], settings: TokenizerSettings) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import FSMTTokenizer

    langs = [_plain_language(settings.src_lang, "en"), _plain_language(settings.tgt_lang, "de")]
    first = ["<s>", "<pad>", "</s>", "<unk>"]

    def build(vocab: dict[str, int], merges: list[list[str]]) -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            vocab_file, merges_file = Path(scratch, "vocab.json"), Path(scratch, "merges.txt")
            vocab_file.write_text(_json(vocab), encoding="utf-8")
            text = "".join(f"{left} {right}\n" for left, right in merges)
            merges_file.write_text(text, encoding="utf-8")
            return FSMTTokenizer(langs, str(vocab_file), str(vocab_file), str(merges_file))

    moses = build({token: i for i, token in enumerate(first)}, [])
    words = [
        " ".join(moses.moses_tokenize(moses.moses_pipeline(line, langs[0]), langs[0]))
        for line in lines
    ]
    # every letter in both its forms, within a word and at its end, so that no word is unknown
    letters = sorted(set("".join(words)) - {" "})
    known = [*first, *letters, *(f"{letter}</w>" for letter in letters)]
    if settings.vocab_size < len(known):
        raise _too_small(settings.vocab_size, len(known))
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    split = pre_tokenizers.WhitespaceSplit()
    model.pre_tokenizer = pre_tokenizers.Sequence([split, *_digits(settings)])
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=known,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(words, trainer)
    trained = json.loads(model.to_str())["model"]
    build(trained["vocab"], trained["merges"]).save_pretrained(settings.folder)


def _digits(settings: TokenizerSettings) -> list[Any]:
    """Keeps digits apart while merges are learnt, so that no merge joins them later."""
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True)] if settings.split_digits else []


def _plain_language(code: str | None, default: str) -> str:
    """``de`` for ``de_DE``: the language code of Moses."""
    return (code or default).split("_")[0].lower()


def _json(value: dict[str, int]) -> str:
    return json.dumps(value, ensure_ascii=False)


TRAINERS: dict[str, Callable[[list[str], TokenizerSettings], None]] = {
    "bart": _train_bart,
    "fsmt": _train_fsmt,
    "marian": _train_marian,
    "mbart": _train_mbart,
    "pegasus": _train_pegasus,
    "t5": _train_t5,
}
