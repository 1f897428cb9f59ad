"""Strict settings for every test: CPU, strict promotion, warnings as errors, checked shapes."""

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not os.environ.keys() & {"PYTEST_XDIST_WORKER", "JAX_COMPILATION_CACHE_DIR"}:
    # What one worker has compiled the others need not compile again, in this run alone.
    COMPILED = tempfile.TemporaryDirectory(prefix="paged-decode-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
# Also in the processes that tests start.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jaxtyping
import pytest

from . import checked

ROOT = Path(__file__).parents[1]
# Every module but those of kernels: Triton compiles their source and cannot see through wrappers.
MODULES = [
    ".".join(("paged_decode", *path.relative_to(ROOT).with_suffix("").parts)).replace(
        "paged_decode.paged_decode.", "paged_decode."
    )
    for room in ("allocator", "kernels", "paged_decode")
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py" and "@triton.jit" not in path.read_text()
]
# Every annotation of the package is checked at run time while the tests run.
jaxtyping.jaxtyped = checked.jaxtyped
jaxtyping.install_import_hook(MODULES, "tests.checked.check")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for tests of meshes; the others use the first one

MAPS = Path("/proc/self/maps")
FINISHED = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Forget compiled programs before they have all the memory maps that Linux gives a process.

    Each has about twenty, of 65,530; where one cannot be had, the process ends without a word.
    """
    if next(FINISHED) % 16 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """What a backend's own answer excludes is no result of the suite: neither pass nor skip."""
    return ("refused", "r", "REFUSED") if hasattr(report, "refusal") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(report.refusal for report in terminalreporter.stats.get("refused", ()))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"REFUSED [{count}] {reason}")


@pytest.fixture
def compiled():
    """A list to which every compilation adds its name."""
    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: names.append(name) if "backend_compile" in name else None
    )
    yield names
    jax.monitoring.clear_event_listeners()


@pytest.fixture
def unchecked():
    """Turn the shape checker off, so that the errors which users see are the ones tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
