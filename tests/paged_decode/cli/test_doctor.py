"""`paged-decode doctor` says which backends are there, why not the others, and which are wrong."""

from __future__ import annotations

from unittest import mock

import pytest

from paged_decode import cli
from paged_decode.cli import doctor
from paged_decode.kernels import BACKENDS


def test_every_backend_has_one_line_with_its_check_or_its_cure(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for backend in BACKENDS:
        assert sum(line.startswith(backend.name + " ") for line in lines) == 1
    text = "\n".join(lines)
    assert "agrees with the reference" in text
    assert "serves gpu, not cpu" in text and "pip install 'paged-decode[cuda]'" in text
    assert "serves tpu, not cpu" in text and "pip install 'paged-decode[tpu]'" in text


@pytest.fixture(scope="module")
def found():
    return {one.name: one for one in doctor.diagnose()}


def test_what_runs_here_is_checked_and_the_rest_has_a_reason(found):
    assert found["xla"].tried and found["xla"].sound
    assert not found["reference"].tried and found["reference"].error == 0
    for name in ("triton", "pallas_tpu"):
        assert found[name].reason and found[name].cure and found[name].error is None


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_backend_with_wrong_numbers_is_named_and_the_status_is_not_zero(wrong, capsys):
    attend = doctor.paged_attention

    def broken(*args, implementation, **options):
        out = attend(*args, implementation=implementation, **options)
        return out + wrong if implementation == ["xla"] else out

    with mock.patch.object(doctor, "paged_attention", broken):
        assert cli.main(["doctor"]) == 1
    assert "WRONG RESULTS from xla" in capsys.readouterr().out


@pytest.mark.parametrize(
    "device,platform,extra", [("dev/nvidia0", "gpu", "cuda"), ("dev/accel0", "tpu", "tpu")]
)
def test_a_device_that_jax_does_not_use_is_named_with_its_cure(tmp_path, device, platform, extra):
    (tmp_path / device).parent.mkdir()
    (tmp_path / device).touch()
    cure = doctor._cure((platform,), "cpu", tmp_path)
    assert cure is not None and f"/{device} that jax does not use" in cure
    assert f"paged-decode[{extra}]" in cure
