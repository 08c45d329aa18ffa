"""Translation pairs generated from Unicode CLDR, which Babel includes: any number, no download.

A *fact* is independent of language: a day, an amount of money, a language as spoken in a
territory. Its English rendering is the source, its rendering in German, French or Romanian the
target. Each fact is used once, so that the splits share no fact and no source text, not even with
different target languages.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import babel
from babel.dates import format_date, format_datetime, format_time
from babel.numbers import format_currency
from babel.units import format_unit

from s2s_scale.errors import UserError

TARGET_LANGUAGES = {"German": "de", "French": "fr", "Romanian": "ro"}
SPLIT_SIZES = {"train": 20_000, "val": 500, "test": 500}

Renderer = Callable[[str], str]  # locale code -> text

_UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-mile", "length-inch",
    "mass-kilogram", "mass-gram", "mass-ton", "volume-liter", "area-hectare",
    "area-square-kilometer", "area-square-meter", "duration-hour", "duration-minute",
    "duration-second", "duration-day", "duration-week", "duration-month", "duration-year",
    "temperature-celsius", "speed-kilometer-per-hour", "energy-kilowatt-hour", "power-watt",
    "digital-megabyte", "digital-gigabyte", "frequency-megahertz",
)  # fmt: skip
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "RON", "SEK", "PLN", "CAD", "AUD", "INR", "BRL")
_LANGUAGES = (
    "ar", "bg", "zh", "cs", "da", "nl", "en", "et", "fi", "fr", "de", "el", "he", "hi", "hu", "is",
    "id", "ga", "it", "ja", "ko", "lv", "lt", "no", "fa", "pl", "pt", "ro", "ru", "sr", "sk", "sl",
    "es", "sw", "sv", "th", "tr", "uk", "vi", "cy",
)  # fmt: skip
_TERRITORIES = (
    "AR", "AU", "AT", "BE", "BR", "BG", "CA", "CL", "CN", "CO", "HR", "CZ", "DK", "EG", "EE", "FI",
    "FR", "DE", "GR", "HU", "IS", "IN", "ID", "IE", "IL", "IT", "JP", "KE", "LV", "LT", "LU", "MY",
    "MX", "MA", "NL", "NZ", "NO", "PE", "PH", "PL", "PT", "RO", "RU", "RS", "SK", "SI", "ZA", "KR",
    "ES", "SE", "CH", "TH", "TN", "TR", "UA", "GB", "US", "VN",
)  # fmt: skip
_FIRST_DAY = datetime.date(1970, 1, 1)
_DAYS = (datetime.date(2050, 1, 1) - _FIRST_DAY).days
_MONTH_WITHOUT_ABBREVIATION = 5  # English 'May' is its own abbreviation


class Pair(NamedTuple):
    """One row: ``source`` names the target language in its prefix (``to German: 4 hours``)."""

    source: str
    target: str


def demo_pairs(*, seed: int = 0, sizes: dict[str, int] | None = None) -> dict[str, list[Pair]]:
    """The pairs of each split, determined by seed and sizes.

    The names of single languages and territories cannot be inferred from others, so they occur
    only in ``train``; ``val`` and ``test`` use them in phrases such as "Czech (Finland)". The
    splits have no source text in common, with or without its prefix.

    Raises:
        UserError: the training split has fewer rows than there are single names, or a size is
            negative.
    """
    sizes = dict(SPLIT_SIZES if sizes is None else sizes)
    renderers = [_language(c) for c in _LANGUAGES] + [_territory(c) for c in _TERRITORIES]
    names = [_pair(language, render) for render in renderers for language in TARGET_LANGUAGES]
    if sizes["train"] < len(names) or min(sizes.values()) < 0:
        raise UserError(
            f"sizes={sizes}: expected at least {len(names)} rows in train (the single names) and "
            "no negative size; give larger sizes"
        )
    rng = random.Random(seed)
    wanted = sum(sizes.values()) - len(names)
    taken, languages = {_plain(pair.source) for pair in names}, list(TARGET_LANGUAGES)
    phrases: list[Pair] = []
    for fact in _facts(rng):
        if len(phrases) == wanted:
            break
        pair = _pair(languages[len(phrases) % len(languages)], fact)
        if _plain(pair.source) not in taken:
            taken.add(_plain(pair.source))
            phrases.append(pair)
    splits: dict[str, list[Pair]] = {}
    for split in sorted(sizes, key=lambda name: name == "train"):  # train takes the rest
        count = sizes[split] - (len(names) if split == "train" else 0)
        splits[split], phrases = phrases[:count], phrases[count:]
    splits["train"] += names
    rng.shuffle(splits["train"])
    return {split: splits[split] for split in sizes}


def write_demo_data(
    folder: Path | str, *, seed: int = 0, sizes: dict[str, int] | None = None
) -> None:
    """Write ``{train,val,test}.{source,target}`` into ``folder``, one row per line, UTF-8."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in demo_pairs(seed=seed, sizes=sizes).items():
        for side in ("source", "target"):
            text = "".join(getattr(pair, side) + "\n" for pair in pairs)
            (folder / f"{split}.{side}").write_text(text, encoding="utf-8", newline="\n")


def _pair(language: str, render: Renderer) -> Pair:
    """The pair of a fact, with CLDR's no-break and narrow spaces replaced by ordinary ones."""
    source, target = (" ".join(render(code).split()) for code in ("en", TARGET_LANGUAGES[language]))
    return Pair(f"to {language}: {source}", target)


def _plain(source: str) -> str:
    """The source text without the prefix that names the target language."""
    return source.partition(": ")[2]


def _facts(rng: random.Random) -> Iterator[Renderer]:
    """An endless stream of facts, whose kinds are drawn by weight."""
    kinds = (_date, _time, _date_and_time, _measure, _money, _language_of_territory)
    weights = (6, 2, 2, 6, 4, 4)
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield kind(rng)


def _date(rng: random.Random) -> Renderer:
    width = rng.choice(("short", "medium", "long", "full"))
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
    if width == "medium" and day.month == _MONTH_WITHOUT_ABBREVIATION:
        width = "full"  # English 'May 4, 2021' is both medium and long; German differs
    return lambda locale: format_date(day, width, locale=locale)


def _time(rng: random.Random) -> Renderer:
    width = rng.choice(("short", "medium"))
    moment = _moment(rng).time()
    return lambda locale: format_time(moment, width, locale=locale)


def _date_and_time(rng: random.Random) -> Renderer:
    width = rng.choice(("short", "medium"))
    moment = _moment(rng)
    return lambda locale: format_datetime(moment, width, locale=locale)


def _moment(rng: random.Random) -> datetime.datetime:
    midnight = datetime.datetime.combine(_FIRST_DAY, datetime.time())
    return midnight + datetime.timedelta(
        days=rng.randrange(_DAYS), seconds=rng.randrange(24 * 60 * 60)
    )


def _measure(rng: random.Random) -> Renderer:
    unit = rng.choice(_UNITS)
    length: Literal["long", "short"] = rng.choice(("long", "short"))
    amount = _amount(rng, decimals=rng.choice((0, 0, 1)))
    return lambda locale: format_unit(amount, unit, length, locale=locale)


def _money(rng: random.Random) -> Renderer:
    currency = rng.choice(_CURRENCIES)
    style: Literal["standard", "name"] = rng.choice(("standard", "name"))
    amount = _amount(rng, decimals=2)
    return lambda locale: format_currency(amount, currency, locale=locale, format_type=style)


def _amount(rng: random.Random, *, decimals: int) -> float:
    """A random amount whose upper bound, 10 to 10**6, is drawn on a logarithmic scale."""
    return (
        round(rng.uniform(1, 10 ** rng.randint(1, 6)), decimals)
        if decimals
        else float(rng.randrange(1, 10 ** rng.randint(1, 6)))
    )


def _language_of_territory(rng: random.Random) -> Renderer:
    language, territory = rng.choice(_LANGUAGES), rng.choice(_TERRITORIES)
    # CLDR's locale display pattern, '{0} ({1})' in all the languages used here
    return lambda locale: f"{_language(language)(locale)} ({_territory(territory)(locale)})"


def _language(code: str) -> Renderer:
    return lambda locale: str(babel.Locale.parse(locale).languages[code])


def _territory(code: str) -> Renderer:
    return lambda locale: str(babel.Locale.parse(locale).territories[code])
