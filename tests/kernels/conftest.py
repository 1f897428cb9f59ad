"""The backends that only tests have, and how a test of one backend may end besides passing."""

from collections.abc import Generator, Iterator
from functools import partial
from unittest import mock

import pytest

from paged_decode.kernels import dispatch

from .oracle import SERVE_EVERYTHING
from .pallas_tpu import interpret as tpu
from .triton import interpret


@pytest.fixture(scope="session", autouse=True)
def interpreted_backends() -> Iterator[None]:
    """Let `implementation=` name the interpreted kernel beside the library's own backends."""
    backends = (*dispatch.BACKENDS, *interpret.BACKENDS, *tpu.BACKENDS)
    served = [name for name in dispatch.__all__ if name.endswith("attend")]
    wider = {name: partial(getattr(dispatch, name), backends=backends) for name in served}
    with mock.patch.multiple(dispatch, **wider):
        yield


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
