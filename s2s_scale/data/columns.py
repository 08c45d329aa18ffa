"""Finds the source and target text among the columns of a table, nested ones included."""

from __future__ import annotations

from collections.abc import Sequence

from s2s_scale.errors import did_you_mean, raise_problems

NESTED = "translation"


def find_columns(
    columns: Sequence[str],
    *,
    wanted: tuple[str | None, str | None],
    languages: tuple[str | None, str | None],
    where: str,
) -> tuple[str, str]:
    """The columns of source and target text among ``columns``.

    Fields of a nested column are named ``outer.inner``. ``wanted`` are --source_column and
    --target_column, ``languages`` are --src_lang and --tgt_lang: mBART's ``en_XX`` finds ``en``.
    Raises ``UserError`` naming ``where``, the missing column and the columns that are there.
    """
    found = []
    problems = []
    for side, name, language in zip(("source", "target"), wanted, languages, strict=True):
        column = _find(columns, side=side, wanted=name, language=language)
        if column is None:
            problems.append(_missing(columns, side=side, wanted=name, where=where))
        else:
            found.append(column)
    if len(set(found)) == 1 and not problems:
        problems.append(
            f"{where}: column '{found[0]}' is both source and target; expected two different "
            f"columns; name them with --source_column and --target_column"
        )
    raise_problems(problems)
    return found[0], found[1]


def _find(
    columns: Sequence[str], *, side: str, wanted: str | None, language: str | None
) -> str | None:
    if wanted is not None:
        candidates = [wanted, f"{NESTED}.{wanted}"]
    else:
        candidates = [side]
        if language is not None:
            candidates += [f"{NESTED}.{language}", f"{NESTED}.{language.split('_')[0]}"]
    return next((name for name in candidates if name in columns), None)


def _missing(columns: Sequence[str], *, side: str, wanted: str | None, where: str) -> str:
    there = ", ".join(columns) if columns else "none"
    name = wanted or side
    remedy = f"name the right one with --{side}_column"
    if wanted is None and any(column.startswith(f"{NESTED}.") for column in columns):
        language = {"source": "--src_lang", "target": "--tgt_lang"}[side]
        remedy += f", or give the language with {language}"
    return (
        f"{where}: no column '{name}' for the {side} text{did_you_mean(name, columns)}; "
        f"expected one of the columns there: {there}; {remedy}"
    )
