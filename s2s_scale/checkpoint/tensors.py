"""Tensors in safetensors files, written one shard at a time and read one tensor at a time.

The files are ordinary safetensors; several of them have an index as transformers writes it. They
are written by hand because the library wants all bytes at once, twice: here the shard's tensors
are written from where they lie, and the checksum is taken of what is written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from s2s_scale.checkpoint.errors import DamagedCheckpoint
from s2s_scale.checkpoint.manifest import Entry, checksum_of, new_checksum

SHARD_BYTES = 1 << 30
"""A file is closed before it grows beyond this, unless a single tensor is larger."""

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


class TensorWriter:
    """Writes ``STEM.safetensors``, or numbered shards and their index, into a folder.

    Tensors must stay as they are until their shard is written; at most one shard is held.
    """

    def __init__(self, folder: Path, stem: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.stem = stem
        self.shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[list[str], Entry]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a CPU tensor; writes a shard when this one no longer fits in."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._write_shard()
        self._held[name] = tensor
        self._held_bytes += size
        self._total += size

    def finish(self) -> dict[str, Entry]:
        """Write what is held and the index; entries of all files. None are written for nothing."""
        if self._held:
            self._write_shard()
        if len(self._shards) < 2:
            names = [f"{self.stem}.safetensors"] * len(self._shards)
        else:
            count = len(self._shards)
            names = [f"{self.stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        entries = {name: entry for name, (_, entry) in zip(names, self._shards, strict=True)}
        if len(names) > 1:
            entries |= self._write_index(names)
        return entries

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.stem}.part-{number}"

    def _write_index(self, names: list[str]) -> dict[str, Entry]:
        shards = zip(names, self._shards, strict=True)
        weight_map = {key: name for name, (keys, _) in shards for key in keys}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        path = self.folder / f"{self.stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")
        return {path.name: checksum_of(path)}

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
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
        digest, size = new_checksum(), 0
        with self._part(len(self._shards)).open("wb") as file:
            for block in (struct.pack("<Q", len(text)), text, *map(_bytes, self._held.values())):
                file.write(block)
                digest.update(block)
                size += len(block)
        self._shards.append((list(self._held), Entry(size, digest.hexdigest())))
        self._held, self._held_bytes = {}, 0


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)


class TensorReader:
    """Reads tensors by name from ``STEM.safetensors`` or its shards; a context manager.

    Raises:
        DamagedCheckpoint: a file is missing or is no safetensors file.
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
        """The tensor's shape; its data are not read."""
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
