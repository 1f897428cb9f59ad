"""The backends that only tests have, and how a test of one backend may end besides passing."""

import re
from collections.abc import Generator, Iterator
from functools import partial
from unittest import mock

import pytest

from paged_decode.kernels import dispatch

from .oracle import MAY_REFUSE
from .pallas_gpu import interpret as hopper
from .pallas_tpu import interpret as tpu
from .triton import interpret as triton

# What is about the op and not about one of its kernels.
AROUND = {"test_transforms.py", "test_merge.py", "test_dense.py", "test_shared_prefix.py"}


@pytest.fixture(scope="session", autouse=True)
def interpreted_backends() -> Iterator[None]:
    """Let `implementation=` name the interpreted kernels beside the library's own backends."""
    backends = (*dispatch.BACKENDS, *triton.BACKENDS, *tpu.BACKENDS, *hopper.BACKENDS)
    served = ("attend", "append_and_attend", "attend_joined")
    wider = {name: partial(getattr(dispatch, name), backends=backends) for name in served}
    with mock.patch.multiple(dispatch, **wider):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to CI one option with several queries, where another test tries all at once, and what
    the op does around a kernel that XLA compiles for seconds in every test."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        around = params.get("backend") == tpu.NAME and item.path.name in AROUND
        one_of_many = params.get("tokens") == 5 and params.get("name") not in (None, "all at once")
        if around or one_of_many:
            item.add_marker(pytest.mark.long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Mark a test that ended in a refusal which its backend may give: `tests/conftest.py`."""
    report = yield
    backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    error = call.excinfo.value if call.excinfo else None
    if call.when == "call" and isinstance(error, (ExceptionGroup, NotImplementedError)):
        every = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        allowed = MAY_REFUSE.get(backend, ())
        if all(isinstance(e, NotImplementedError) for e in every) and all(
            any(reason in str(e) for reason in allowed) for e in every
        ):
            report.outcome = "skipped"
            report.refusal = re.sub(r"; got .*", "", str(every[0]))
            report.longrepr = (str(item.path), item.location[1] or 0, report.refusal)
    return report
