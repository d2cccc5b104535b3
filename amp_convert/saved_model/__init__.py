"""Converted models as files: frozen ones to deploy, others to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.saved_model.archive import Archive as Archive
    from amp_convert.saved_model.checkpoint import Checkpoint as Checkpoint

__getattr__, __all__ = names_in(__name__, archive="Archive", checkpoint="Checkpoint")
