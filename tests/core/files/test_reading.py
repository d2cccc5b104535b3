"""Every text of others is read in linear time, or refused in one clause."""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from pathlib import Path

import pytest

from amp_convert.core.files.reading import parse_json, parse_toml, read_file
from tests.growth import assert_linear

DEEP = "it is nested too deeply"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, DEEP),
        ("[" * 250 + "]" * 250, DEEP),
        ('{"a":' * 250 + "1" + "}" * 250, DEEP),
        ("1" * 5_000, "the number 1111111111…1111111111111 has 5000 digits"),
        (f"-{10**18}", "has 20 digits"),
        ("[1e999]", "the number 1e999 is too large"),
        ("NaN", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ('{"b": 1, "a": {"x": 1, "x": 1}}', "the key 'x' is repeated"),
        ('{"a"', "Expecting ':' delimiter"),
    ],
    ids=range(10),
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        parse_json(text.encode())
    assert len(str(refused.value)) < 200


def test_json_that_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -1.5e3, "\xc3\xbc", null]}') == {
        "a": [1, -1500.0, "ü", None]
    }
    assert parse_json(str(10**40).encode(), digits=50) == 10**40
    with pytest.raises(ValueError, match="it is not UTF-8 text: invalid start byte at byte 1"):
        parse_json(b'"\xff"')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n" + ".".join("a" * 20_000) + " = 1", "line 2 has a key of more than 16 parts"),
        ("a = {" + " . ".join(["'a'"] * 17) + " = 1}", "line 1 has a key of more than 16 parts"),
        ('["a"' + '."b\\""' * 17 + "]", "line 1 has a key of more than 16 parts"),
        ("a = " + "[" * 100_000, DEEP),
        ("a = " + "[" * 250 + "]" * 250, DEEP),
        ("a = " + "1" * 5_000, "it holds a number of thousands of digits"),
    ],
    ids=range(6),
)
def test_toml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        parse_toml(text)
    assert not isinstance(refused.value, tomllib.TOMLDecodeError)


def test_toml_that_is_read() -> None:
    text = "[" + ".".join("abcdefghij") + "]\nnode = 'a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r'\n"
    table = parse_toml(text)
    for key in "abcdefghij":
        table = table[key]
    assert len(table["node"]) == 35
    with pytest.raises(tomllib.TOMLDecodeError, match="line 2"):
        parse_toml("a = 1\n=")


@pytest.mark.parametrize(
    "unit", ["a ", ',"', ',"\\', "\n'", '"""\\', "a.", "[a]\n", "#", "\n", "{a.", "a=1\n", "'''"]
)
def test_time_is_linear_in_the_text(unit: str) -> None:
    def read(count: int) -> None:
        with contextlib.suppress(ValueError):
            parse_toml(unit * count + "=")

    assert_linear(read, 10_000)


def test_a_file_is_read_so_far_and_no_link_where_none_may_be(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_bytes(b"12345")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert read_file(link, 5) == b"12345"
    with pytest.raises(ValueError, match="it is larger than 0 MiB"):
        read_file(file, 4)
    with pytest.raises(ValueError, match="it is larger than 1 MiB"):
        read_file(Path("/dev/zero"), 2**20)
    for path in (link, pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"\w"):
            read_file(path, follow=False)
    assert read_file(file, follow=False) == b"12345"


def test_brackets_in_strings_and_comments_are_no_nesting() -> None:
    opened = "[" * 300
    text = f'''
a = "{opened} \\" {opened}" # {opened}
b = '{opened}'
c = """
{opened} " '
"""
d = \'\'\'{opened} " """ \'\'\'
[[rule]]
e = [{{ f = [1, 2] }}] # "
'''
    assert parse_toml(text)["rule"] == [{"e": [{"f": [1, 2]}]}]
    for unclosed in ('a = """', "a = '''", 'a = "', "a = '"):
        with pytest.raises(tomllib.TOMLDecodeError):
            parse_toml(unclosed + opened)


def test_what_is_nested_too_deeply_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tomllib, "loads", lambda text: pytest.fail("it was parsed"))
    for text in ("a = " + "[" * 200, "a = " + "[1, " * 200, "a = " + "{b = " * 200):
        with pytest.raises(ValueError, match=DEEP):
            parse_toml(text)


@pytest.mark.parametrize("piece", ["[", '"', "'", '"""', "'''", "#[", "[]", '"""x"""[', "\\"])
def test_looking_for_brackets_takes_linear_time(piece: str) -> None:
    def read(count: int) -> None:
        with contextlib.suppress(ValueError):
            parse_toml("a = " + piece * count)

    assert_linear(read, 2000)
