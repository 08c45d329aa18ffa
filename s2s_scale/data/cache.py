"""The cache of tokenised data on disk: keys made from content, entries that appear atomically.

An entry is a folder named by its key. It holds Arrow files, the lengths as .npy files, and
``entry.json`` with the number of rows, the sizes of the files and the range of token ids. The
digests of texts, tokenizers and rows that keys are made of also tell a resumed run whether its data
has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from s2s_scale.data.compat import fingerprint_of
from s2s_scale.errors import UserError

FORMAT = 1  # raise when the columns or the way of tokenising change
MANIFEST = "entry.json"
SOURCE_LENGTHS, TARGET_LENGTHS = "source_lengths.npy", "target_lengths.npy"
COLUMNS = ("input_ids", "labels")
SAMPLED_ROWS = 1000
# Keys of tokenizer_config.json that say where a tokenizer came from, or what its latest call
# asked for, and not how it tokenises.
PASSING_KEYS = {
    "_commit_hash", "chat_template", "is_local", "local_files_only", "max_length",
    "name_or_path", "padding_strategy", "pad_to_multiple_of", "stride", "tokenizer_file",
    "transformers_version", "truncation_side", "truncation_strategy", "vocab_file",
}  # fmt: skip


def default_cache_dir() -> Path:
    """$S2S_SCALE_CACHE, else $XDG_CACHE_HOME/s2s_scale, else ~/.cache/s2s_scale."""
    own = os.environ.get("S2S_SCALE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "s2s_scale"


def content_key(pairs: Any, tokenizer: Any, *, settings: Mapping[str, Any]) -> str:
    """32 hex digits of all that the tokenised rows depend on; the same in every process."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(hash_pairs(pairs))
    digest.update(hash_tokenizer(tokenizer))
    digest.update(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    return digest.hexdigest()


def hash_pairs(pairs: Any) -> bytes:
    """Digest of the text in columns source and target of a ``datasets.Dataset``.

    Texts and their lengths are hashed separately, so the chunks of the table do not matter.
    """
    import pyarrow as pa

    digests = [hashlib.blake2b() for _ in range(4)]
    columns = ("source", "target")
    for table in pairs.select_columns(list(columns)).with_format("arrow").iter(100_000):
        for side, name in enumerate(columns):
            for chunk in table.column(name).cast(pa.large_string()).chunks:
                offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)
                offsets = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
                text = chunk.buffers()[2]
                digests[2 * side].update(np.diff(offsets).tobytes())
                if text is not None:
                    digests[2 * side + 1].update(memoryview(text)[offsets[0] : offsets[-1]])
    return b"".join(digest.digest() for digest in digests)


def hash_tokenizer(tokenizer: Any) -> bytes:
    """Digest of how a tokenizer tokenises, taken from the files that it saves and its languages.

    Settings of its latest call are left out: a fast tokenizer keeps the truncation of that call in
    tokenizer.json, so its files differ before and after its first use.
    """
    digest = hashlib.blake2b()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.name}\0".encode() + _lasting_content(path) + b"\0")
    names = ("src_lang", "tgt_lang", "truncation_side")
    state = {name: str(getattr(tokenizer, name, None)) for name in names}
    digest.update(json.dumps([type(tokenizer).__name__, state]).encode())
    return digest.digest()


def _lasting_content(path: Path) -> bytes:
    if path.name == "tokenizer.json":
        passing = {"truncation", "padding"}
    elif path.name == "tokenizer_config.json":
        passing = PASSING_KEYS
    else:
        return path.read_bytes()
    content = json.loads(path.read_text(encoding="utf-8"))
    lasting = {key: value for key, value in content.items() if key not in passing}
    return json.dumps(lasting, sort_keys=True).encode()


def write_entry(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Have ``fill`` write an entry's files into a temporary folder, then rename it to ``folder``.

    ``fill`` returns the manifest, to which the sizes of the files are added. Other processes see a
    complete entry or none, even while several of them write the same one.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(folder)
        temporary.mkdir()
        facts = dict(fill(temporary))
        facts["format"] = FORMAT
        facts["files"] = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        _put_in_place(temporary, folder)
    except OSError as error:
        raise UserError(
            f"data cache {folder.parent}: cannot be written ({error.strerror or error}); "
            f"expected a folder with room for the tokenised data; give --data_cache_dir or set "
            f"S2S_SCALE_CACHE to another one"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """A hidden name in the same file system. Not mkdtemp's: its folders are closed to others."""
    return folder.parent / f".{folder.name}.{uuid.uuid4().hex}"


def _put_in_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # there is an entry: damaged, unwanted, or just written by another process
        old = _beside(folder)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        finally:
            shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an entry, or None for one that is missing, damaged or of another format."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in facts["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = facts.get("format") == FORMAT and sizes == facts["files"]
    return dict(facts) if whole else None


def entry_of(dataset: Any) -> Path | None:
    """The entry that a tokenised data set was loaded from; None if it was changed since.

    A data set made from it by ``select``, ``filter``, ``map``, ... has another fingerprint and no
    entry: the saved lengths are not its own.
    """
    files = getattr(dataset, "cache_files", None)
    if not files:
        return None
    folder = Path(files[0]["filename"]).parent
    if fingerprint_of(dataset) != folder.name:
        return None
    facts = read_manifest(folder)
    return folder if facts is not None and facts.get("rows") == len(dataset) else None


def read_lengths(folder: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The saved source and target lengths of an entry, in tokens."""
    return np.load(folder / SOURCE_LENGTHS), np.load(folder / TARGET_LENGTHS)


def rows_fingerprint(dataset: Any) -> str:
    """Digest of the token ids of every row of a ``datasets.Dataset``.

    Of another map-style data set, whose rows may be slow to read, up to 1,000 rows spread over it
    and its length are taken.
    """
    import pyarrow.compute as pc

    digest = xxhash.xxh3_128(str(len(dataset)).encode())
    arrow = hasattr(dataset, "select_columns") and hasattr(dataset, "with_format")
    names = [name for name in COLUMNS if arrow and name in dataset.column_names]
    if names:
        for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=100_000):
            for name in names:
                column = table.column(name)
                lengths = pc.list_value_length(column).to_numpy()
                digest.update(lengths.astype(np.int32).tobytes())
                for chunk in column.chunks:
                    values = chunk.flatten().to_numpy(zero_copy_only=False)
                    digest.update(np.ascontiguousarray(values, dtype=np.int32).data)
        return str(digest.hexdigest())
    for number in np.unique(np.linspace(0, len(dataset) - 1, SAMPLED_ROWS).astype(int)).tolist():
        if number < 0:
            continue
        row = dataset[number]
        if hasattr(row, "keys"):
            plain = {name: np.asarray(row[name]).tolist() for name in COLUMNS if name in row}
            digest.update(json.dumps(plain).encode())
        else:
            digest.update(repr(row).encode())
    return str(digest.hexdigest())
