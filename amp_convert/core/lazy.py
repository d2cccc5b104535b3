"""Names of a package that are imported when they are first used, so that importing it is cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def names_in(package: str, **modules: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package, from its modules and the names that each gives,
    parted by spaces. A dot in a module's name is written as two underscores."""
    homes = {
        name: f"{package}.{module.replace('__', '.')}"
        for module, names in modules.items()
        for name in names.split()
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, sorted(homes)
