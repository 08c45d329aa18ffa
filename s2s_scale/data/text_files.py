"""Reads a text file with one row per line into Arrow strings, and checks that it is UTF-8.

A row ends at ``\\n`` or ``\\r\\n`` only. Other characters that Unicode calls line separators
(U+2028, U+0085, form feed, ...) are text: splitting there would shift every later row of one file
against the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2s_scale.data.problems import Problems

BLOCK_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE, RETURN = 10, 13


def read_lines(path: Path, *, problems: Problems) -> pa.ChunkedArray:
    """The lines of the file as strings, without their line ends and a leading byte order mark.

    Lines that are not UTF-8 are added to ``problems``; the result is then missing rows and its
    caller must raise the problems. Takes about a second per gigabyte.
    """
    chunks: list[pa.Array] = []
    first_line = 1
    for block in _blocks(path):
        if _is_utf8(block, path=path, first_line=first_line, problems=problems):
            chunks.append(_split_lines(block))
        first_line += block.count(b"\n")
    return pa.chunked_array(chunks, type=pa.string())


def check_utf8(path: Path, *, problems: Problems) -> None:
    """Add every line of the file that is not UTF-8 to ``problems``."""
    first_line = 1
    for block in _blocks(path):
        _is_utf8(block, path=path, first_line=first_line, problems=problems)
        first_line += block.count(b"\n")


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks of whole lines, without a leading byte order mark."""
    with path.open("rb") as file:
        rest = file.read(len(BYTE_ORDER_MARK))
        if rest == BYTE_ORDER_MARK:
            rest = b""
        while block := file.read(BLOCK_BYTES):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            if cut:
                yield block[:cut]
            rest = block[cut:]
        if rest:
            yield rest


def _is_utf8(block: bytes, *, path: Path, first_line: int, problems: Problems) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        _report_bytes(block, path=path, first_line=first_line, problems=problems)
        return False
    return True


def _report_bytes(block: bytes, *, path: Path, first_line: int, problems: Problems) -> None:
    encoding = "UTF-16" if b"\x00" in block else "LATIN1"
    for number, line in enumerate(block.split(b"\n"), start=first_line):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(
                f"lines of {path} that are not UTF-8",
                f"{path}:{number}: byte 0x{line[error.start]:02x} at position {error.start + 1} "
                f"is not UTF-8; expected UTF-8 text; convert the file, for example with "
                f"'iconv -f {encoding} -t UTF-8'",
            )


def _split_lines(block: bytes) -> pa.StringArray:
    """Arrow strings over one copy of the block from which the line ends are taken out."""
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == NEWLINE)
    returns = (ends > 0) & (data[ends - 1] == RETURN)
    text = np.delete(data, np.concatenate([ends, ends[returns] - 1]))
    # A line's end in the remaining text: its place in the file, less the line ends before it.
    stops = ends - np.arange(len(ends)) - np.cumsum(returns)
    if data[-1] != NEWLINE:
        stops = np.append(stops, len(text))
    offsets = np.concatenate([[0], stops]).astype(np.int32)
    return pa.StringArray.from_buffers(len(stops), pa.py_buffer(offsets), pa.py_buffer(text))
