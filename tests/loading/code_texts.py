"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amp_convert.core.errors import ModelError


def failure(function: Callable[[str], object], source: str) -> str:
    with pytest.raises(ModelError) as caught:
        function(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
