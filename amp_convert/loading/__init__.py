"""The user's settings and model file -> `Settings` and a `Case`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.loading.model_file import Case as Case
    from amp_convert.loading.model_file import load_case as load_case
    from amp_convert.loading.read_settings import load_settings as load_settings
    from amp_convert.loading.settings import Settings as Settings

__getattr__, __all__ = names_in(
    __name__,
    model_file="Case load_case",
    read_settings="load_settings",
    settings="Settings",
)
