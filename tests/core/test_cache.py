"""A folder of answers: whole or absent, bounded, and its owner's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from amp_convert.core.files import hidden_folders
from amp_convert.core.files.cache import Cache, Entry

KEY, OTHER = "a" * 64, "b" * 64
TENSORS = {
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bool": torch.tensor(True),
    "empty": torch.zeros(0, 3),
    "complex": torch.tensor([1 + 2j]),
    "strided": torch.arange(6).reshape(2, 3).t(),
}


def test_what_was_put_is_got(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    document = {"x": [1, 2.5, "é\x1b", None, 2**70]}
    cache.put(KEY, Entry(document, TENSORS))
    found = Cache(tmp_path / "new" / "cache").get(KEY)
    assert found is not None
    assert found.document == document
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in TENSORS.items())
    assert cache.get(OTHER) is None
    if os.name == "posix":
        assert (tmp_path / "new" / "cache").stat().st_mode & 0o77 == 0


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    cache, tensor = Cache(tmp_path), torch.arange(4.0)
    cache.put(KEY, Entry(None, {"a": tensor, "b": tensor[1:]}))
    found = cache.get(KEY)
    assert found is not None
    assert torch.equal(found.tensors["b"], tensor[1:])


def test_an_entry_that_was_cut_short_or_changed_is_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, Entry({"answer": 1}, TENSORS))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i])
        assert cache.get(KEY) is None
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        found = cache.get(KEY)
        assert found is None or found.document == {"answer": 1}, i
    path.write_bytes(whole)
    assert cache.get(KEY) is not None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    inside, outside = Cache(tmp_path / "in"), Cache(tmp_path / "out")
    outside.put(KEY, Entry(1))
    inside.put(OTHER, Entry(2))
    (tmp_path / "in" / f"{KEY}.safetensors").symlink_to(tmp_path / "out" / f"{KEY}.safetensors")
    assert outside.get(KEY) is not None
    assert inside.get(KEY) is None


def test_what_was_not_asked_for_the_longest_goes(tmp_path: Path) -> None:
    size = {"t": torch.zeros(1000)}
    cache = Cache(tmp_path, limit=13_000)
    keys = [c * 64 for c in "abcd"]
    (tmp_path / "of the user").write_text("stays")
    for i, key in enumerate(keys[:3]):
        cache.put(key, Entry(i, size))
        os.utime(tmp_path / f"{key}.safetensors", (i, i))
    assert cache.get(keys[0]) is not None  # asked for just now
    cache.put(keys[3], Entry(3, size))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    assert (tmp_path / "of the user").read_text() == "stays"


def test_an_entry_larger_than_all_of_it_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=2000)
    cache.put(KEY, Entry(1))
    cache.put(OTHER, Entry(2, {"t": torch.zeros(1000)}))
    assert cache.get(KEY) is not None
    assert cache.get(OTHER) is None


def test_a_folder_that_cannot_be_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put(KEY, Entry(1))
    assert cache.get(KEY) is None


def test_what_a_killed_run_left_is_deleted(tmp_path: Path) -> None:
    with hidden_folders.fresh(tmp_path / f"{KEY}.safetensors", hidden_folders.Kind.PART) as folder:
        left = tmp_path / folder.name
    left.mkdir()
    (left / "half").write_text("")
    Cache(tmp_path).put(OTHER, Entry(1))
    assert [path.name for path in tmp_path.iterdir()] == [f"{OTHER}.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      "])
def test_a_foreign_file_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{KEY}.safetensors").write_bytes(content)
    assert Cache(tmp_path).get(KEY) is None
