"""Several processes on this machine, with one allocator each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("one_process.py")
GOLDEN = json.loads((ROOT / "tests/golden/smollm2_greedy.json").read_text())


def run_two(tmp_path, cases: str, gguf: str, timeout: float) -> list:
    """What two processes write; both are killed when time is up, as SIGTERM would not end them.

    The first one serves jax.distributed, so it stays until the second has left: that is when its
    standard input ends.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path / f"out{i}.json" for i in range(2)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=paths)
    processes = []
    for i, out in enumerate(outs):
        command = [sys.executable, SCRIPT, port, 2, i, cases, out, gguf]
        with open(tmp_path / f"log{i}", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            )
    try:
        for process in reversed(processes):
            process.communicate(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((tmp_path / f"log{i}").read_text() for i in range(2))
    assert all(process.returncode == 0 and out.exists() for process, out in
               zip(processes, outs, strict=True)), logs  # fmt: skip
    return [json.loads(out.read_text()) for out in outs]


def test_tables_that_differ_are_a_named_error_on_every_process(tmp_path):
    for name, message in run_two(tmp_path, "-", "disagree", 60):
        assert name == "ReplicaMismatch" and "at check 3" in message


@pytest.mark.long
def test_two_processes_generate_the_golden_tokens(real_gguf, tmp_path):
    cases = sorted(GOLDEN["cases"], key=lambda c: len(c["prompt_ids"]))[:2]
    (tmp_path / "in.json").write_text(json.dumps(cases))
    for tokens in run_two(tmp_path, str(tmp_path / "in.json"), str(real_gguf), 300):
        assert tokens == [case["greedy_ids"][:8] for case in cases]
