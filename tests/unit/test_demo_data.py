"""The demo's pairs: true, learnable, deterministic, and without leaks between the splits."""

from __future__ import annotations

import collections
import datetime
import re
import unicodedata

import pytest

from s2s_scale.demo.data import SPLIT_SIZES, TARGET_LANGUAGES, demo_pairs, write_demo_data
from s2s_scale.errors import UserError

SMALL = {"train": 1_200, "val": 60, "test": 60}


@pytest.fixture(scope="module")
def splits():
    return demo_pairs()


def plain(pair):
    return pair.source.split(": ", 1)[1]


def test_sizes_are_those_that_the_demo_announces(splits):
    assert {split: len(pairs) for split, pairs in splits.items()} == SPLIT_SIZES


def test_no_source_text_is_in_two_splits_even_without_its_prefix(splits):
    texts = {split: {plain(pair) for pair in pairs} for split, pairs in splits.items()}
    assert all(texts.values())
    assert not texts["test"] & texts["train"]
    assert not texts["test"] & texts["val"]
    assert not texts["val"] & texts["train"]


def test_a_source_has_one_translation(splits):
    sources = [pair.source for pairs in splits.values() for pair in pairs]
    assert len(set(sources)) == len(sources)


def test_languages_are_about_equally_frequent_in_every_split(splits):
    for pairs in splits.values():
        counts = collections.Counter(pair.source.split(": ")[0] for pair in pairs)
        assert set(counts) == {f"to {language}" for language in TARGET_LANGUAGES}
        assert max(counts.values()) <= 1.05 * min(counts.values())


def test_every_name_and_letter_of_the_test_can_be_learnt(splits):
    """Each word with a letter in it, on either side, occurs in the training rows as well."""

    def words(split):
        text = " ".join(f"{plain(pair)} {pair.target}" for pair in splits[split])
        return {word for word in re.findall(r"\w+", text) if not any(c.isdigit() for c in word)}

    assert len(words("test")) > 200
    assert words("test") <= words("train")


def test_text_has_plain_spaces_only_and_fits_one_line(splits):
    for pairs in splits.values():
        for text in (text for pair in pairs for text in pair):
            assert text == text.strip()
            assert "  " not in text
            assert not {c for c in text if c != " " and unicodedata.category(c)[0] in "ZC"}, text


@pytest.mark.parametrize(
    ("source", "target"),
    [
        # from the languages themselves, not from Babel
        (r"to German: (\w+) (\d+), (\d{4})", r"{1}. {0} {2}"),
        (r"to French: (\w+) (\d+), (\d{4})", r"{1} {0} {2}"),
        (r"to Romanian: (\w+) (\d+), (\d{4})", r"{1} {0} {2}"),
    ],
)
def test_dates_are_the_same_day_in_both_languages(splits, source, target):
    months = {
        "to German": "Januar Februar März April Mai Juni Juli August September Oktober November "
        "Dezember",
        "to French": "janvier février mars avril mai juin juillet août septembre octobre novembre "
        "décembre",
        "to Romanian": "ianuarie februarie martie aprilie mai iunie iulie august septembrie "
        "octombrie noiembrie decembrie",
    }
    english = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
    checked = 0
    for pair in splits["train"]:
        found = re.fullmatch(source, pair.source)
        if found is None or found[1] not in english or found[1] == "May":
            continue
        names = dict(zip(english, months[pair.source.split(":")[0]].split(), strict=True))
        assert pair.target == target.format(names[found[1]], found[2], found[3])
        checked += 1
    assert checked > 100


def test_clock_times_are_the_same_moment(splits):
    checked = 0
    for pair in splits["train"]:
        found = re.fullmatch(r"to \w+: (\d+):(\d\d) ([AP])M", pair.source)
        if found:
            hour = int(found[1]) % 12 + (12 if found[3] == "P" else 0)
            assert pair.target == f"{hour:02}:{found[2]}"
            checked += 1
    assert checked > 100


def test_known_translations(splits):
    everything = {pair.source: pair.target for pair in splits["train"]}
    assert everything["to German: Switzerland"] == "Schweiz"
    assert everything["to French: Switzerland"] == "Suisse"
    assert everything["to Romanian: Switzerland"] == "Elveția"
    assert everything["to Romanian: Hungarian"] == "maghiară"


def test_the_seed_decides(splits):
    assert demo_pairs(seed=3, sizes=SMALL) == demo_pairs(seed=3, sizes=SMALL)
    assert demo_pairs(seed=3, sizes=SMALL) != demo_pairs(seed=4, sizes=SMALL)
    assert demo_pairs() == splits


def test_written_files_hold_the_pairs_line_by_line(tmp_path):
    write_demo_data(tmp_path / "data", sizes=SMALL)
    expected = demo_pairs(sizes=SMALL)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        f"{split}.{side}" for split in SMALL for side in ("source", "target")
    )
    for split, pairs in expected.items():
        for side in ("source", "target"):
            content = (tmp_path / "data" / f"{split}.{side}").read_bytes().decode("utf-8")
            assert content.endswith("\n")
            assert content[:-1].split("\n") == [getattr(pair, side) for pair in pairs]


@pytest.mark.parametrize(
    "sizes", [{"train": 10, "val": 1, "test": 1}, {"train": 2_000, "val": -1, "test": 1}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="expected at least"):
        demo_pairs(sizes=sizes)
