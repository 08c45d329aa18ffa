"""Tensors in safetensors files, written one shard at a time and read one tensor at a time.

The files are ordinary safetensors, and several of them have an index as transformers writes it.
The library's own writer would need two copies of a whole shard in memory; this one writes tensors
directly from their storage and computes the checksum on the way.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from s2s_scale.checkpoint.manifest import DamagedCheckpoint, Entry, checksum_of, new_checksum

SHARD_BYTES = 1 << 30
"""Maximum size of a file in bytes, unless a single tensor is larger."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Part(NamedTuple):
    """A file of tensors that does not have its final name yet."""

    file: str
    keys: tuple[str, ...]
    tensor_bytes: int
    entry: Entry


class TensorWriter:
    """Writes tensors into the files of one rank; ``name_parts`` then names those of all ranks.

    Tensors must not change until their shard is written. At most one shard is held in memory.
    """

    def __init__(
        self, folder: Path, stem: str, *, shard_bytes: int = SHARD_BYTES, rank: int = 0
    ) -> None:
        self.folder = folder
        self.stem = stem
        self.shard_bytes = shard_bytes
        self.rank = rank
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._parts: list[Part] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a CPU tensor; writes the current shard first if the tensor no longer fits."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._write_shard()
        self._held[name] = tensor
        self._held_bytes += size

    def finish(self) -> list[Part]:
        """Write the last shard; returns all files of this writer, none if nothing was added."""
        if self._held:
            self._write_shard()
        return self._parts

    def _write_shard(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in self._held.items():
            end = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes
        data: Iterator[Any] = (  # copies only tensors that are not contiguous, one at a time
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            for tensor in self._held.values()
        )
        digest, size = new_checksum(), 0
        name = f"{self.stem}.part-{self.rank}-{len(self._parts)}"
        with (self.folder / name).open("wb") as file:
            for block in chain([struct.pack("<Q", len(text)), text], data):
                file.write(block)
                digest.update(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())  # rank 0 could not do this for files of other hosts
        entry = Entry(size, digest.hexdigest())
        self._parts.append(Part(name, tuple(self._held), self._held_bytes, entry))
        self._held, self._held_bytes = {}, 0


def name_parts(folder: Path, stem: str, parts: Sequence[Part]) -> dict[str, Entry]:
    """Rename the files of all ranks, add an index if there are several; returns their entries."""
    count = len(parts)
    numbered = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = numbered if count > 1 else [f"{stem}.safetensors"] * count
    for name, part in zip(names, parts, strict=True):
        (folder / part.file).rename(folder / name)
    entries = {name: part.entry for name, part in zip(names, parts, strict=True)}
    if count > 1:
        pairs = zip(names, parts, strict=True)
        index = {
            "metadata": {"total_size": sum(part.tensor_bytes for part in parts)},
            "weight_map": {key: name for name, part in pairs for key in part.keys},
        }
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")
        entries[path.name] = checksum_of(path)
    return entries


class TensorReader:
    """Context manager that reads tensors by name from ``STEM.safetensors`` or its shards.

    Raises:
        DamagedCheckpoint: a file is missing or is not a safetensors file.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if single.is_file():
            self._file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        elif index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedCheckpoint(f"{index}: not an index of tensors ({error})") from error

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def get(self, name: str) -> Tensor:
        """A copy of the tensor, in host memory."""
        tensor: Tensor = self._open(self._file_of[name]).get_tensor(name)
        return tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            if Path(name).name != name:
                raise DamagedCheckpoint(f"{path}: expected a file inside {self.folder}")
            try:
                self._files[name] = safe_open(path, framework="pt")
            except Exception as error:
                raise DamagedCheckpoint(
                    f"{path}: cannot be read as safetensors ({error})"
                ) from error
        return self._files[name]
