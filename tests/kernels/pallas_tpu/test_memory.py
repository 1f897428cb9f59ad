"""A few shapes under the interpreter that models DMA: nothing races, nothing is read too early.

Memory that nobody wrote is NaN there, and an address outside an array raises.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 300


def run(mode: str, *names: str) -> dict:
    request = json.dumps(dict(mode=mode, names=names))
    command = [sys.executable, "-m", "tests.kernels.pallas_tpu.memory_worker", request]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_no_copy_races_and_none_is_read_before_it_arrived(mode):
    names = "ragged", "window", "tail", "append", "write"
    eight_bits = "int8", "float8, tail", "append int8", "write int8"
    for name, answer in run(mode, *names, *eight_bits).items():
        assert "raised" not in answer, (name, answer)
        assert not answer["races"], name
        assert answer["error"] < 2e-5, (name, answer)


@pytest.mark.long
def test_a_missing_wait_and_an_address_outside_the_pool_are_caught():
    """The interpreter is on trial, with kernels that are broken on purpose."""
    found = run("on_wait", "without waits", "without bounds")
    late, outside = found["without waits"], found["without bounds"]
    assert not late.get("error", float("nan")) < 1  # NaN: the pages never arrived
    race = run("eager", "without waits")["without waits"]
    assert race["races"] or "race" in race.get("raised", "").lower(), race
    assert "out of bounds" in outside.get("raised", "").lower().replace("-", " "), outside
