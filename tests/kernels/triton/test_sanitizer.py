"""The kernel under compute-sanitizer, on a card: no access out of bounds, no race."""

import shutil
import subprocess
import sys

import jax
import pytest

SANITIZER = shutil.which("compute-sanitizer")

# Rows that are cut and merged, one that is whole and an empty one; then the newest tokens written.
PROGRAM = """
import numpy as np, jax.numpy as jnp
from paged_decode.kernels import append_and_attend, paged_attention
rng = np.random.default_rng(0)
lens = np.array([700, 0, 33, 1000], np.int32)
table = rng.permutation(np.arange(1, 257)).reshape(4, 64).astype(np.int32)
k, v = (jnp.asarray(rng.standard_normal((257, 2, 16, 128)), jnp.bfloat16) for _ in range(2))
q = jnp.asarray(rng.standard_normal((4, 8, 128)), jnp.bfloat16)
new = q[:, :2]
want = paged_attention(q, k, v, table, lens, implementation="reference")
got = paged_attention(q, k, v, table, lens, implementation="triton")
np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=0.02, atol=0.02)
tail = jnp.asarray(rng.standard_normal((4, 40, 8, 128)), jnp.bfloat16)
want = paged_attention(tail, k, v, table, lens, implementation="reference")
got = paged_attention(tail, k, v, table, lens, implementation="triton")
np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=0.02, atol=0.02)
out, *_ = append_and_attend(k, v, q, new, new, table, lens, implementation="triton")
assert jnp.isfinite(out).all()
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    SANITIZER is None or jax.default_backend() != "gpu", reason="needs a card and compute-sanitizer"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
