"""Random examples are the same in every run: a failure that comes and goes helps nobody.

What is traced once is not traced again: the tests share a cache of captures, which lasts for one
run of the suite. Those of `tests/capture` trace for themselves, and so does a test that is marked
`traces`, such as one that looks at how tracing goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the suite's cache, which is the user's for the commands that tests run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "amp-convert"


@pytest.fixture(autouse=True)
def traced_once(request: pytest.FixtureRequest, shared_cache: Path) -> Iterator[None]:
    """Captures come from the shared cache where they can."""
    path = Path(str(request.fspath))
    if "capture" in path.parts or request.node.get_closest_marker("traces"):
        yield
        return
    from amp_convert.capture.kept.answers import kept_in
    from amp_convert.core.files.cache import Cache

    with kept_in(Cache(shared_cache)):
        yield
