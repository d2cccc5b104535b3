"""What tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from amp_convert.rules.rule_set import Place, Rules


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rule(target: str, pattern: str, category: str, reason: str = "r", **more: str) -> str:
    lines = {target: pattern, "category": category, "reason": reason, **more}
    return "[[rule]]\n" + "".join(f"{key} = '{value}'\n" for key, value in lines.items())


def op(rules: Rules, name: str, dtype: str = "float16", device: str = "cpu") -> str | None:
    found = rules.match_op(Place(dtype, device, "eval"), name)
    return found and found.reason
