"""What every test may use. It runs with pytest alone, so that the client's tests run without the rest."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # not there in the environments of `make test-oldest`
    from hypothesis import settings

    # No deadline: nothing asserts wall-clock speed. Under CI the same examples every time.
    settings.register_profile("tenuto", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("tenuto")


@pytest.fixture(autouse=True, scope="session")
def only_the_settings_of_the_test() -> Iterator[None]:
    """Tests do not depend on the shell's own TENUTO_* settings; the places of data and models stay."""
    kept = {"TENUTO_DATA", "TENUTO_MODELS"}
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("TENUTO_") and name not in kept:
                patch.delenv(name)
        yield
