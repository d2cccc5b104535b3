"""Random examples are the same in every run: a failure that comes and goes helps nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests let the tool keep is theirs, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_other_tests(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """To the fingerprint of code, the modules of other tests in this process are not loaded: they
    would be a user's, and hold what has no digest."""
    from amp_convert.capture.kept import fingerprint, origins

    loaded_files = origins.loaded_files

    def without() -> Iterable[tuple[str, str]]:
        for name, file in loaded_files():
            if not Path(file).is_relative_to(Path(__file__).parent) or Path(file) == request.path:
                yield name, file

    monkeypatch.setattr(origins, "loaded_files", without)
    monkeypatch.setattr(fingerprint, "loaded_files", without)
