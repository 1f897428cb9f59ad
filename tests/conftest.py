"""Strict settings for every test: CPU, strict promotion, warnings as errors, checked shapes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Every array annotation of the package is checked at run time while the tests run.
install_import_hook("paged_decode", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def unchecked():
    """Turn the shape checker off, so that the errors which users see are the ones tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
