"""`paged-decode pressure`: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json

import pytest

from paged_decode.cli import main
from paged_decode.pressure._case import WORKLOADS, read_workload

from ..pressure.test_workload import DATA
from ..tiny import make_engine as tiny_engine


def make_engine(*, num_pages, page_size, eviction):
    engine = tiny_engine(num_pages, page_size)
    return engine


def rows_of(path):
    return len(path.read_text().splitlines()) - 1


def test_a_sweep_writes_its_files_and_does_not_repeat_itself(tmp_path, capsys):
    pytest.importorskip("tqdm")
    command = ["pressure", "sweep", "tree", "--limit", "20", "--rate", "20", "--out", str(tmp_path)]
    command += ["--pages", "128", "512", "--eviction", "lru", "fifo", "--preemption", "swap"]
    assert main(command) == 0
    runs = json.loads((tmp_path / "sweep.json").read_text())
    assert [(r["policy"], r["pages"]) for r in runs] == [
        ("swap", 128),
        ("swap", 512),
        ("fifo+swap", 128),
        ("fifo+swap", 512),
    ]
    assert all(r["finished"] == 20 and r["goodput"] >= 0 for r in runs)
    assert rows_of(tmp_path / "sweep.csv") == 4
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 5 and 'src="data:' in page and "http" not in page
    assert len(list(tmp_path.glob("*.png"))) == 5

    cases = [p for p in tmp_path.glob("tree-*.json")]
    cases[0].unlink()  # as if it had been cut off
    kept = {p: p.stat().st_mtime_ns for p in cases[1:]}
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in cases[1:]} == kept
    assert json.loads((tmp_path / "sweep.json").read_text()) == runs

    capsys.readouterr()
    assert main(["pressure", "compare", str(tmp_path / "sweep.json"), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "hit_rate" in shown and "(x1.00)" in shown
    assert rows_of(tmp_path / "compare.csv") == 4


def test_a_run_writes_the_report_of_a_real_engine(tmp_path, capsys):
    pytest.importorskip("tqdm")
    command = ["pressure", "run", "poisson", "--limit", "6", "--rate", "1000", "--num-pages", "64"]
    command += ["--page-size", "4", "--vocab-size", "61", "--time-scale", "0"]
    command += ["--engine", f"{__name__}:make_engine", "--out", str(tmp_path)]
    assert main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    # The generated prompts have some 500 tokens, the pool 252 places: some can never fit.
    assert report["requests"] == 6
    assert rows_of(tmp_path / "requests.csv") == 6
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", [w.partition(":")[0] for w in WORKLOADS])
def test_every_workload_of_the_help_text_exists(name):
    paths = {"mooncake": DATA / "mooncake_250.jsonl", "azure": DATA / "azure_19.csv"}
    word = f"{name}:{paths[name]}" if name in paths else name
    once = list(read_workload(word, 12, 2.0, 1.0, 0))
    twice = list(read_workload(word, 12, 2.0, 2.0, 0))
    assert len(once) == 12
    arrivals = [r.arrival_seconds for r in once]
    assert arrivals == sorted(arrivals)
    assert [r.arrival_seconds for r in twice] == [2 * a for a in arrivals]


@pytest.mark.parametrize("word", ["nothing", "mooncake", "poisson:file", ""])
def test_an_unknown_workload_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        main(["pressure", "sweep", word, "--pages", "9"])
    assert "workload must be one of" in capsys.readouterr().err


def test_a_missing_trace_is_one_line(tmp_path, capsys):
    word = f"azure:{tmp_path / 'none.csv'}"
    assert main(["pressure", "sweep", word, "--pages", "9", "--out", str(tmp_path)]) == 1
    assert "none.csv" in capsys.readouterr().err
