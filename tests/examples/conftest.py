"""The examples are scripts beside a package `models`; they are imported from their own folder."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real model's file; without a network the test is skipped, but never in CI."""
    import weights

    try:
        return weights.fetch()
    except weights.WeightsError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no weights: {error}")


@pytest.fixture(scope="session")
def real_gemma() -> Path:
    """Gemma 3 270M, for whoever has it: its terms of use are theirs to accept, never a test's."""
    import weights

    if (path := weights.present(weights.GEMMA3)) is None:
        pytest.skip("needs Gemma 3: python examples/generate.py --model gemma3-270m says how")
    return path
