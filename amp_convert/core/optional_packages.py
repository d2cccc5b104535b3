"""Packages that are installed on request only, and what to say where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from amp_convert.core.errors import UsageError


def require(extra: str, *packages: str) -> None:
    """Raise UsageError unless all of an extra's `packages` are installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{' and '.join(missing)} {verb} not installed",
            mend=f"Install what it takes: pip install 'amp-convert[{extra}]'.",
        )
