"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.report import text as fmt


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.0, "0"),
        (0.000123456, "1.23e-04"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
    ],
)
def test_errors_have_three_digits_and_spell_out_what_is_not_finite(
    value: float | None, shown: str
) -> None:
    assert fmt.error(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.745, "74.5 %"),
        (0.00001, "< 0.1 %"),
        (0.99999, "> 99.9 %"),
        (math.nan, "nan %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(share: float, shown: str) -> None:
    assert fmt.percent(share) == shown


def test_times_sizes_and_counts() -> None:
    assert [fmt.milliseconds(t) for t in (None, 0.01234, 2.314, 1234.4)] == [
        "",
        "0.0123 ms",
        "2.31 ms",
        "1,234 ms",
    ]
    assert [fmt.mebibytes(size) for size in (None, 3 * 2**20, 2**30)] == ["", "3 MiB", "1,024 MiB"]
    assert [fmt.size(size) for size in (1, 1023, 1024, 1_023_487, 1_023_488, 3 * 2**20)] == [
        "1 byte",
        "1,023 bytes",
        "1 KiB",
        "999 KiB",
        "0.976 MiB",
        "3 MiB",
    ]
    assert [fmt.millions(size) for size in (999, 25_557_032, 999_900_000)] == [
        "999",
        "25.6 M",
        "1 G",
    ]
    assert fmt.count(1, "batch", "batches") == "1 batch"
    assert fmt.count(2048, "batch", "batches") == "2,048 batches"


def test_a_change_has_its_sign() -> None:
    assert [fmt.change(0.5, after) for after in (0.25, 0.5, 0.75)] == ["-0.25", "0", "+0.25"]


def test_a_value_may_be_text() -> None:
    assert fmt.quantity("identical\n") == "identical\\n"
    assert [fmt.quantity(value) for value in (None, 0.00012345, 3.0)] == ["", "0.0001234", "3"]
    assert [fmt.quantity(value) for value in (0.999973, 1.0)] == ["0.999973", "1"]


@given(st.text(st.characters()))
def test_printable_text_has_no_control_or_invisible_character(text: str) -> None:
    shown = fmt.printable(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set("\u202a\u202e\u2066\u2069\u200b\u200f\u061c\ufeff\uffff") & set(shown)


def test_ordinary_text_is_printed_as_it_is() -> None:
    text = "encoder.layer.0/aten._softmax#1: |x| ≤ 65504, größer, 層"
    assert fmt.printable(text) == text


@given(st.text(), st.integers(2, 40))
def test_clipped_text_keeps_both_ends(text: str, width: int) -> None:
    shown = fmt.clip(text, width)
    assert len(shown) <= width
    if len(text) > width:
        gap = width - 1 - (width - 1) * 3 // 5
        assert shown == text[:gap] + "…" + text[len(text) - (width - 1 - gap) :]
    else:
        assert shown == text


@pytest.mark.parametrize(
    ("path", "width", "shown"),
    [
        ("model.py:41", 20, "model.py:41"),
        ("encoder.layer.4.intermediate.dense", 30, "…layer.4.intermediate.dense"),
        ("transformers/models/bert/modeling_bert.py:29", 26, "…bert/modeling_bert.py:29"),
        ("x" * 50, 10, "…" + "x" * 9),
        ("a.bbbbbbbbbbbbbbbbbbbbbbbbbbb.c.", 10, "…bbbbbb.c."),
    ],
)
def test_a_long_path_keeps_its_last_parts(path: str, width: int, shown: str) -> None:
    assert fmt.tail(path, width) == shown


@given(st.text("ab./"), st.integers(3, 40))
def test_the_tail_of_a_path_fits(path: str, width: int) -> None:
    assert len(fmt.tail(path, width)) <= width
    assert path.endswith(fmt.tail(path, width).removeprefix("…"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (65536.0, "65536"),
        (1.0, "1"),
        (0.5, "0.5"),
        (131072.0, "2¹⁷"),
        (2.0**100, "2¹⁰⁰"),
        (100000.0, "100000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_loss_scale_is_short(value: float, text: str) -> None:
    assert fmt.scale(value) == text


def test_a_power_of_two_has_its_exponent_above() -> None:
    assert [fmt.power_of_two(n) for n in (-24, 0, 16)] == ["2⁻²⁴", "2⁰", "2¹⁶"]
