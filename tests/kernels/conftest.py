"""How a test of one backend may end besides passing: with that backend's refusal and reason."""

from collections.abc import Generator

import pytest

from .oracle import SERVE_EVERYTHING


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Show a refusal as xfail, unless the backend has to serve everything."""
    backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    try:
        return (yield)
    except (ExceptionGroup, NotImplementedError) as error:
        every = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        reasons = [str(e) for e in every if isinstance(e, NotImplementedError)]
        if backend in (None, *SERVE_EVERYTHING) or len(reasons) != len(every):
            raise
        pytest.xfail(f"refused: {'; '.join(reasons)}")
