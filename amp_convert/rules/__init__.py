"""Rules files -> `Rules`: which precision category an operator, layer or node gets, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.rules.load import load_rules as load_rules
    from amp_convert.rules.rule import Category as Category
    from amp_convert.rules.rule import Rule as Rule
    from amp_convert.rules.rule_set import Rules as Rules

__getattr__, __all__ = names_in(__name__, rule="Category Rule", load="load_rules", rule_set="Rules")
