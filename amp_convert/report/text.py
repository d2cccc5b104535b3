"""Numbers and names as people read them: the one place that decides how a report spells them.

A number that is missing (None) is an empty cell; a number that is not finite is spelled out, since
"nan" in a report is a finding. A share is never rounded to 0 % or 100 % unless it is exactly that.
"""

from __future__ import annotations

import math
import re

from amp_convert.core.printable import clip as clip
from amp_convert.core.printable import printable as printable

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def tail(text: str, width: int) -> str:
    """A path (of modules or files) in at most `width` characters, its first parts left out."""
    if len(text) <= width:
        return text
    kept = text[len(text) - width + 1 :]
    cut = re.search(r"[./](?=.)", kept[: width // 2])
    return "…" + (kept[cut.end() :] if cut else kept)


def error(value: float | None) -> str:
    """A relative error: 3 significant digits in scientific notation, exact zero as "0"."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.2e}"


def number(value: float | None) -> str:
    """A quantity of unknown scale, such as a user's metric: 6 significant digits."""
    return "" if value is None else f"{value:.6g}"


def quantity(value: float | str | None) -> str:
    """A check's value or threshold: text as it is, numbers in 4 significant digits.

    A number near 1, such as a cosine, gets 6, so as not to read as exactly 1.
    """
    if value is None or isinstance(value, str):
        return printable(value or "")
    text = f"{value:.4g}"
    return f"{value:.6g}" if text == "1" else text


def change(before: float, after: float) -> str:
    """The signed difference of a metric, "0" when there is none."""
    return "0" if before == after else f"{after - before:+.3g}"


def percent(share: float) -> str:
    """A fraction of 1 as a percentage with one decimal."""
    if abs(share - 1) < 1e-9:  # a sum of shares may miss 1 by its roundings
        share = 1.0
    if not math.isfinite(share) or share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %"


def scale(value: float) -> str:
    """A loss scale: in full up to 65536, where most begin, and a higher power of two as such."""
    if value > 2**16 and math.isfinite(value) and math.frexp(value)[0] == 0.5:
        return power_of_two(math.frexp(value)[1] - 1)
    return number(value)


def power_of_two(exponent: int) -> str:
    """ "2⁻²⁴"."""
    return f"2{str(exponent).translate(_SUPERSCRIPT)}"


def milliseconds(value: float | None) -> str:
    """A time in milliseconds, 3 significant digits from 1 ms down, whole ones from 100 ms up."""
    if value is None:
        return ""
    return f"{value:,.0f} ms" if value >= 100 or not math.isfinite(value) else f"{value:.3g} ms"


def mebibytes(value: int | None) -> str:
    """A size in bytes as MiB."""
    if value is None:
        return ""
    mib = value / 2**20
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"


def size(value: int) -> str:
    """The size of a file: in bytes below 1 KiB, then in KiB while 3 digits do, then in MiB."""
    if value < 2**10:
        return count(value, "byte")
    return f"{value / 2**10:.3g} KiB" if value < 999.5 * 2**10 else mebibytes(value)


def count(value: int, noun: str, plural: str = "") -> str:
    """ "1 node", "2,048 nodes"."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def millions(value: int) -> str:
    """A count of parameters or multiply-adds: "25.6 M"."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return str(value)
