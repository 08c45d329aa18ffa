"""Which columns of a table hold the source and the target texts, and whether these are texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from s2s_scale.errors import LISTED, Problems, did_you_mean, raise_problems

SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string())])
NESTED = "translation"


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that the user named, for source and target.

    ``wanted``: --source_column and --target_column. ``languages``: --src_lang and --tgt_lang.
    """

    wanted: tuple[str | None, str | None] = (None, None)
    languages: tuple[str | None, str | None] = (None, None)

    def find(self, columns: Sequence[str], *, where: str) -> tuple[str, str]:
        """The source and the target column among ``columns``.

        Fields of a nested column are named ``outer.inner``. mBART's language code ``en_XX`` also
        finds ``translation.en``.

        Raises:
            UserError: a column is missing, or both sides would be the same. The message begins
                with ``where`` and lists the columns that are there.
        """
        found, problems = [], []
        for side, flag, wanted, language in zip(
            ("source", "target"), ("src_lang", "tgt_lang"), self.wanted, self.languages, strict=True
        ):
            name = wanted or side
            candidates = [name]
            if wanted is not None:
                candidates.append(f"{NESTED}.{wanted}")
            elif language is not None:
                candidates += [f"{NESTED}.{language}", f"{NESTED}.{language.split('_')[0]}"]
            column = next((candidate for candidate in candidates if candidate in columns), None)
            if column is not None:
                found.append(column)
                continue
            remedy = f"name the right one with --{side}_column"
            if wanted is None and any(column.startswith(f"{NESTED}.") for column in columns):
                remedy += f", or give the language with --{flag}"
            problems.append(
                f"{where}: no column '{name}' for the {side} text{did_you_mean(name, columns)}; "
                f"expected one of the columns there: {', '.join(columns) or 'none'}; {remedy}"
            )
        if len(set(found)) == 1 and not problems:
            problems.append(
                f"{where}: column '{found[0]}' is both source and target; expected two different "
                f"columns; name them with --source_column and --target_column"
            )
        raise_problems(problems)
        return found[0], found[1]


def check_types(types: Mapping[str, pa.DataType], *, where: str) -> None:
    """Raise ``UserError`` for columns whose Arrow type is not text."""
    problems = Problems()
    for name, kind in types.items():
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
            problems.add(
                "columns that are not text",
                f"{where}: column '{name}' holds {kind}; expected text (string); convert the "
                f"column or name another with --source_column and --target_column",
            )
    problems.raise_any()


def report_blank(
    rows: pa.RecordBatch | pa.Table,
    lines: npt.NDArray[np.int64],
    *,
    where: Callable[[int, str], str],
    origin: str,
    problems: Problems,
) -> None:
    """Add every row whose source or target is missing, empty or all white space.

    ``lines``: int64 [rows], the line of each row in its file; ``where`` names a line of a side.
    """
    for side in ("source", "target"):
        column = rows.column(side).cast(pa.large_string())
        blank = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
        found = np.flatnonzero(pc.fill_null(blank, True).to_numpy(zero_copy_only=False))
        problems.add_many(
            f"empty {side} lines in {origin}",
            (
                f"{where(int(lines[row]), side)}: empty {side} text (found "
                f"{column[int(row)].as_py()!r}); expected text; fill it in, or delete the row from "
                f"source and target"
                for row in found[:LISTED]
            ),
            count=len(found),
        )
