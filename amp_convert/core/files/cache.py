"""Answers that take long, each in a file of its own under a digest of all that it depends on.

An entry is JSON and tensors, in one safetensors file, so that reading it runs no code. It carries
a digest of itself: one that was cut short or changed is none. The folder is its owner's alone; no
link in it is followed. Where it is full, what was not asked for the longest goes.

A cache helps or does nothing: what cannot be read or written is left away, and logged.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from amp_convert.core.files import digests, hidden_folders
from amp_convert.core.files.atomic_files import write_file
from amp_convert.core.files.reading import LARGEST, parse_json, read_file

LIMIT = 2**30
"""Bytes of all entries together."""
_LARGEST_HEADER = 100 * 2**20
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_DIGITS = 40
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What is kept under one key."""

    document: Any
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Cache:
    """The entries in one folder, which is made when the first one is written."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self._folder, self._limit = folder, limit

    @classmethod
    def of_user(cls) -> Cache:
        """The cache of whoever runs this."""
        return cls(Path(platformdirs.user_cache_dir("amp-convert", appauthor=False)))

    def get(self, key: str) -> Entry | None:
        """What was kept under a digest, if it is there and whole."""
        path = self._path(key)
        try:
            data = read_file(path, LARGEST, follow=False)
            os.utime(path)
            return _read(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.info("a cached answer is left aside: %s", error)
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry under a digest."""
        try:
            data = _written(entry)
            if len(data) > min(LARGEST, self._limit):
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._path(key), data)
            self._make_room()
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            _log.info("an answer could not be cached: %s", error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        hidden_folders.sweep(self._folder, _NAME)
        found = []
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name):
                state = path.lstat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _digest(document: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return digests.of_text(document + digests.of_tensors(sorted(tensors.items())))


def _written(entry: Entry) -> bytes:
    document = json.dumps(entry.document, allow_nan=False, separators=(",", ":"))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in entry.tensors.items()}
    metadata = {"document": document, "digest": _digest(document, tensors)}
    return save(tensors, metadata)


def _read(data: bytes) -> Entry:
    length = int.from_bytes(data[:8], "little")
    if length > min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError("it has no header")
    metadata = parse_json(data[8 : 8 + length], _DIGITS)["__metadata__"]
    tensors = load(data)
    if metadata["digest"] != _digest(metadata["document"], tensors):
        raise ValueError("it is not what was written")
    return Entry(parse_json(metadata["document"].encode(), _DIGITS), tensors)
