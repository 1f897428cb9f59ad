"""`paged-decode pressure`: what it writes, that it goes on, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from paged_decode.cli import main
from paged_decode.cli import pressure as command
from paged_decode.pressure._case import WORKLOADS, Case, read_workload

from ...examples import tiny_gguf
from ..pressure.test_workload import DATA
from ..tiny import VOCAB
from ..tiny import make_engine as tiny_engine

ROOT = Path(__file__).parents[3]
OVER_SWEEP = {
    *("output_tokens_per_second", "goodput", "ttft_seconds_p90", "hit_rate", "recompute_tax"),
    "lifetimes",
}
OVER_TIME = {"pages", "queue", "preemptions", "ttft", "lifetimes"}


@pytest.fixture(autouse=True)
def _extra():
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")


def make_engine(*, num_pages, page_size, eviction):
    return tiny_engine(num_pages, page_size, vocab_size=VOCAB, prefill_chunk=64)


def rows_of(path):
    return len(path.read_text().splitlines()) - 1


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def pictures(folder):
    return {path.stem for path in folder.glob("*.png")}


def failed(line, capsys, statuses=(1, 2)):
    """The one line that a wrong command prints, and its status, which is 1 or 2."""
    try:
        status = main(["pressure", *line])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status in statuses and out == ""
    (only,) = err.splitlines()
    assert "Traceback" not in only and only.startswith("paged-decode")
    return only


SWEEP = ["sweep", "tree", "--limit", "20", "--rate", "20", "--pages", "128", "512"]


def test_a_sweep_writes_its_files_and_does_not_repeat_itself(tmp_path, capsys):
    line = ["pressure", *SWEEP, "--out", str(tmp_path)]
    line += ["--eviction", "lru", "fifo", "--preemption", "swap"]
    assert main(line) == 0
    runs = strict(tmp_path / "sweep.json")
    assert [(r["policy"], r["pages"]) for r in runs] == [
        ("swap", 128),
        ("swap", 512),
        ("fifo+swap", 128),
        ("fifo+swap", 512),
    ]
    assert all(r["finished"] == 20 and r["goodput"] >= 0 for r in runs)
    assert rows_of(tmp_path / "sweep.csv") == 4
    assert pictures(tmp_path) == OVER_SWEEP
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 1 and page.count("<svg") == len(OVER_SWEEP) - 1
    assert 'src="data:' in page and "http" not in page
    assert "3 TB/s and 600 TFLOP/s" in page and "8B in bfloat16" in page
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("fifo", "512", "20/20", "ttft p90", "hit rate"))
    assert max(map(len, shown.splitlines())) <= max(80, len(str(tmp_path)) + 12)

    cases = [p for p in tmp_path.glob("tree-*.json")]
    cases[0].unlink()  # as if it had been cut off
    cases[1].write_text('{"seconds": 1')  # or somebody had broken it
    cases[2].write_text(re.sub('"hit_rate": [^,]*', '"hit_rate": 5.0', cases[2].read_text()))
    kept = {p: p.stat().st_mtime_ns for p in cases[3:]}
    assert main(line) == 0
    assert {p: p.stat().st_mtime_ns for p in cases[3:]} == kept
    assert strict(tmp_path / "sweep.json") == runs

    capsys.readouterr()
    assert main(["pressure", "compare", str(tmp_path / "sweep.json"), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "hit_rate" in shown and "(x1.00)" in shown and "[4]  eviction fifo, 512" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert rows_of(tmp_path / "compare.csv") == 4

    read, write = os.pipe()
    os.close(read)  # whoever read it has enough
    again = [sys.executable, "-m", "paged_decode.cli", "pressure", "compare", "sweep.json"]
    done = subprocess.run(again, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_one_run_of_a_sweep_is_shown_over_its_time(tmp_path):
    line = ["pressure", "sweep", "samples", "--limit", "9", "--rate", "20", "--pages", "400"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    assert pictures(tmp_path) == OVER_TIME
    (run,) = strict(tmp_path / "sweep.json")
    assert len({len(values) for values in run["timeline"].values()}) == 1


def test_what_does_not_fit_is_counted_named_and_in_the_status(tmp_path, capsys):
    line = ["pressure", *SWEEP, "--out", str(tmp_path)]
    line[line.index("128")] = "64"  # 1024 tokens, prompts of 1280
    assert main(line) == 1
    small, large = strict(tmp_path / "sweep.json")
    assert (small["finished"], small["too_long"], small["hit_rate"]) == (0, 20, None)
    assert (large["finished"], large["too_long"]) == (20, 0)
    (said,) = capsys.readouterr().err.splitlines()
    assert "64 pages: 20 of 20 requests did not finish within 1024 tokens" in said
    assert "requests 0, 1, 2" in said and "12 more" in said
    assert said.partition(": ")[2] in (tmp_path / "report.html").read_text()
    header, first, _ = (tmp_path / "sweep.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=False))["hit_rate"] == ""


def test_a_run_writes_the_report_of_a_real_engine(tmp_path, capsys):
    line = ["pressure", "run", "poisson", "--limit", "6", "--rate", "1000", "--num-pages", "64"]
    line += ["--page-size", "4", "--time-scale", "0", "--out", str(tmp_path)]
    assert main([*line, "--engine", f"{__name__}:make_engine"]) == 1
    report = strict(tmp_path / "report.json")
    # The generated prompts have some 500 tokens, the pool 252 places: some can never fit.
    assert report["requests"] == report["finished"] + report["too_long"] + report["outgrown"] == 6
    assert 0 < report["too_long"] < 6
    out, err = capsys.readouterr()
    assert f"{report['finished']} of 6 requests finished" in out and "time to first token" in out
    assert err.count("\n") == 1 and "requests did not finish within 252 tokens" in err
    assert rows_of(tmp_path / "requests.csv") == 6
    told = ("workload", "eviction", "card", "model", "goodput")
    assert report["eviction"] == "lru" and all(report[name] is not None for name in told)
    page = (tmp_path / "report.html").read_text()
    assert "measured on cpu" in page and "2 layers, 2 KV heads of 8, float32" in page
    assert pictures(tmp_path) == OVER_TIME


def documented():
    """Every command of the documentation, the help texts and the example, once."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/pressure.md")]
    texts += [(ROOT / "examples" / "pressure.py").read_text()]
    texts += [command._SWEEP, command._RUN, command._COMPARE]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    found = [
        shlex.split(line) for line in lines if line.strip().startswith("paged-decode pressure")
    ]
    return list(dict.fromkeys(tuple(words[1:]) for words in found))


@pytest.mark.long
def test_every_documented_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import weights

    lines = documented()
    assert {line[1] for line in lines} == {"sweep", "run", "compare", "calibrate"}
    config = dict(context_length=("u32", 4096))
    llama = tiny_gguf.write_llama(
        tmp_path / "tiny.gguf",
        tiny_gguf.llama_weights(),
        **{f"llama.{key}": value for key, value in config.items()},
    )
    monkeypatch.setattr(weights, "fetch", lambda: llama)  # of the same kind, but small
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first = (DATA / "mooncake_250.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "conversation_trace.jsonl").write_text("".join(first))
    for line in lines:
        assert main(line) == 0, line
        assert capsys.readouterr().err == ""
    report = strict(tmp_path / "pressure" / "report.json")
    assert report["finished"] == report["requests"] == 8


@pytest.mark.parametrize("name", ["tqdm", "matplotlib"])
def test_a_missing_extra_is_one_line_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(Case, "figures", lambda case: pytest.fail("it ran"))
    for line in (SWEEP, ["run", "tree", "--engine", "none.py:f", "--num-pages", "9"]):
        said = failed([*line, "--out", str(tmp_path / "o")], capsys)
        assert f"{name} is not installed" in said and "paged-decode[pressure]" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("action", ["sweep", "run", "compare", "calibrate"])
def test_the_help_says_every_default(action, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["pressure", action, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (--[a-z-]+) .*?(?=^  --|^$)", text, re.M | re.S)
    told = re.findall(r"^  (--[a-z-]+) (?:(?!^  --|^$)[\s\S])*?\(default: ", text, re.M)
    assert set(options) - set(told) <= {"--engine", "--num-pages", "--pages"}  # which are required
    assert "example" in text
    if action == "run":
        assert "num_pages" in text and "page_size" in text and "eviction" in text


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


@pytest.mark.parametrize("word", ["nothing", "mooncake", "mooncake:", "poisson:file", ""])
def test_an_unknown_workload_is_refused(word, capsys):
    assert "workload must be one of" in failed(["sweep", word, "--pages", "9"], capsys)


@pytest.mark.parametrize("content", ["", '{"timestamp": NaN}', "TIMESTAMP,", "\ufeff{}"])
@pytest.mark.parametrize("kind", ["mooncake", "azure"])
def test_a_bad_trace_is_one_line_with_its_place_before_anything_runs(
    tmp_path, kind, content, capsys
):
    (tmp_path / "trace").write_text(content)
    line = ["sweep", f"{kind}:{tmp_path / 'trace'}", "--pages", "9", "--out", str(tmp_path / "o")]
    assert f"{tmp_path / 'trace'}, line 1: " in failed(line, capsys)
    assert not (tmp_path / "o").exists()
    assert "none.csv" in failed(["sweep", f"azure:{tmp_path / 'none.csv'}", "--pages", "9"], capsys)


COUNTS = ("--limit", "--page-size", "--pages", "--host-pages", "--max-rows", "--jobs")
NUMBERS = ("--rate", "--stretch", "--ttft", "--per-token", "--link-bytes", "--weight-bytes")
NUMBERS += ("--kv-bytes-per-token", "--bandwidth-bytes", "--flops")
NAMES = ("--eviction", "--victim", "--preemption", "--admission", "--no-such-option")


@pytest.mark.parametrize(
    "wrong",
    [(name, bad) for name in COUNTS for bad in ("0", "-1", "nan", "inf", "1.5", "x", "9" * 12)]
    + [(name, bad) for name in NUMBERS for bad in ("0", "-1", "nan", "inf", "x")]
    + [("--seed", bad) for bad in ("-1", "nan", "0.5")]
    + [("--page-size", "3")]
    + [(name, "nobody") for name in NAMES]
    + [(name,) for name in (*COUNTS, *NUMBERS, *NAMES[:4], "--out")],
    ids=" ".join,
)
def test_every_wrong_option_is_one_line(wrong, capsys):
    assert wrong[0] in failed([*SWEEP, *wrong], capsys, (2,))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--host-pages", "5"], "--host-pages"),  # nothing goes to the host
        (["--link-bytes", "1e9"], "--link-bytes"),
        (["--pages", "1", "--page-size", "1"], "1 of 1 tokens"),
        (["--pages", "2147483647"], "2147483648"),
        (["--rate", "1e-300"], "arrival_seconds"),
        (["--stretch", "1e300"], "arrival_seconds"),
        (["--out", __file__], "File exists"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(wrong, said, tmp_path, capsys):
    line = [*SWEEP, "--out", str(tmp_path), *wrong]
    assert said in failed(line, capsys)


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("paged_decode.cli.pressure._settle", interrupted)
    assert main(["pressure", *SWEEP]) == 130
    assert capsys.readouterr().err == "paged-decode: interrupted\n"


@pytest.mark.parametrize("name", ["--rate", "--seed"])
def test_what_only_a_generator_has_is_refused_for_a_trace(name, capsys):
    line = ["sweep", f"azure:{DATA / 'azure_19.csv'}", "--pages", "999", name, "1"]
    assert f"{name}: only of generated workloads" in failed(line, capsys, (2,))


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["walk"],
        ["sweep"],
        ["sweep", "tree"],
        ["run", "tree"],
        ["compare"],
        ["compare", "none.json"],
        ["compare", __file__],
        ["compare", str(ROOT / "benchmarks/results/pressure_pool.json")],
        *(
            ["run", "tree", "--engine", "x.py:f", "--num-pages", "9", name, bad]
            for name, bad in (
                ("--num-pages", "1"),
                ("--vocab-size", "0"),
                ("--time-scale", "nan"),
                ("--time-scale", "-1"),
                ("--eviction", "best"),
            )
        ),
    ],
    ids=" ".join,
)
def test_every_wrong_command_is_one_line(line, capsys):
    failed(line, capsys)


def test_reports_are_compared_without_nan_and_lists(tmp_path, capsys):
    for content in ("[]", "5", '["a"]', "{}", "[1", "\xff"):
        (tmp_path / "r.json").write_text(content, "latin-1")
        assert "r.json is no" in failed(["compare", str(tmp_path / "r.json")], capsys)
    old = {"requests": 3, "hit_rate": float("nan"), "lifetimes": [1, 2], "policy": "lru"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    new = old | {"hit_rate": 0.5, "requests": 6}
    (tmp_path / "new.json").write_text(json.dumps([new, new | {"hit_rate": 0}]))
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    assert main(["pressure", "compare", *paths]) == 0
    shown = capsys.readouterr().out
    assert "none" in shown and "nan" not in shown and "6 (x2.00)" in shown


# ---- the user's own function

FILES = {
    "syntax": "def f(:\n",
    "imports": "x = 1\nimport nothing_of_this_name\n",
    "exits": "import sys\nsys.exit(3)\n",
    "raises": 'def f(**sizes):\n    return g()\n\n\ndef g():\n    raise OSError("no\\nroom")\n',
    "takes": "def f(num_pages):\n    return None\n",
    "returns": "def f(num_pages, page_size, eviction):\n    return None\n",
    "shadow": "f = 5\n",
    "empty": "",
    "nulls": "\0",
    "wordless": "raise GeneratorExit\n",
    "mute": (
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n\n\n"
        "def f(**sizes):\n    raise Mute\n"
    ),
    "borrows": "from json import dumps\n\n\ndef mine():\n    return 5\n",
}
SAID = {
    "syntax": "syntax.py:1: SyntaxError",
    "imports": "imports.py:2: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "exits": "exits.py:2: SystemExit: 3",
    "raises": "raises.py:6: OSError: no room",
    "takes": "takes.py:1: f: it is called with num_pages=, page_size=, eviction=",
    "returns": "returns.py:1: f: expected a paged_decode.Engine, got a NoneType",
    "shadow": "'f' of shadow.py is no function, but of type int",
    "empty": "empty.py has no function 'f'",
    "nulls": "nulls.py: SyntaxError",
    "missing": "no file 'missing.py'",
    "wordless": "wordless.py:1: GeneratorExit",
    "mute": "mute.py:7: Mute: its message cannot be read",
    "borrows": "borrows.py has no function 'f'; it has mine",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def asked(engine):
    line = ["run", "poisson", "--limit", "2", "--num-pages", "400", "--page-size", "4"]
    return [*line, "--time-scale", "0", "--engine", engine]


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_with_a_factory_is_a_line_with_its_place(here, name, capsys):
    if name in FILES:
        (here / f"{name}.py").write_text(FILES[name])
    assert SAID[name] in failed(asked(f"{name}.py:f"), capsys)


@pytest.mark.parametrize(
    "name, said",
    [
        ("no_such_module:f", "no module 'no_such_module'"),
        ("json:nothing", "json has no function 'nothing'"),
        ("json.nothing:f", "no module 'json.nothing'"),
        ("math:pi", "no function"),
        ("math:f", "math has no function 'f'"),
        (".relative:f", "relative"),
        ("only_a_name", "expected MODULE:FUNCTION"),
        (":f", "expected MODULE:FUNCTION"),
        ("json:", "expected MODULE:FUNCTION"),
    ],
)
def test_a_module_that_has_no_factory_is_one_line(here, name, said, capsys):
    assert said in failed(asked(name), capsys)


def test_an_error_in_the_users_model_has_its_place_too(here, capsys):
    (here / "broken.py").write_text(
        f"from {tiny_engine.__module__} import make_engine\n\n\n"
        "def model(params, cache, tokens, batch):\n"
        "    return tokens.nothing, cache\n\n\n"
        "def f(num_pages, page_size, eviction):\n"
        "    return make_engine(num_pages, page_size, fn=model, vocab_size=9)\n"
    )
    assert "broken.py:5: AttributeError: " in failed(asked("broken:f"), capsys)


def test_an_engine_of_another_pool_is_told_and_reported_as_it_is():
    engine = make_engine(num_pages=30, page_size=4, eviction=None)
    args = Namespace(engine="x.py:f", num_pages=99, page_size=4, eviction="lru", workload="tree")
    (said,) = command._other_pool(engine, args)
    assert "asked for 99 pages of 4 tokens, and made an engine with 30 of 4" in said
    args.ttft = args.per_token = 1.0
    assert command._about(engine, args)["pages"] == 29
    args.num_pages = 30
    assert command._other_pool(engine, args) == []


@pytest.fixture(scope="module")
def costs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("costs") / "own" / "costs.json"
    line = ["pressure", "calibrate", "--engine", f"{__name__}:make_engine", "--num-pages", "64"]
    assert main([*line, "--page-size", "4", "--out", str(path)]) == 0
    return path


def test_calibrated_costs_take_the_place_of_the_roofline_in_a_sweep(costs_file, tmp_path, capsys):
    line = ["pressure", "sweep", "poisson", "--limit", "9", "--pages", "999", "1999"]
    assert main([*line, "--costs", str(costs_file), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    first, _ = strict(tmp_path / "sweep.json")
    assert first["finished"] == 9 and first["page_size"] == 4 and first["max_rows"] == 4
    assert first["card"].startswith("measured on cpu") and "weights" in first["model"]
    assert "flops" not in first and first["costs"] == str(costs_file)
    for more in (["--flops", "1e12"], ["--max-rows", "8"], ["--link-bytes", "1e9"]):
        line = ["sweep", "poisson", "--limit", "9", "--pages", "999", "--costs", str(costs_file)]
        line += [*more, "--out", str(tmp_path)]
        if "--link-bytes" in more:
            line += ["--preemption", "swap"]
        assert "is measured" in failed(line, capsys, statuses=(2,))
    line = ["sweep", "poisson", "--pages", "999", "--costs", str(costs_file), "--page-size", "16"]
    assert "pages of 4 tokens" in failed(line, capsys, statuses=(2,))
    (tmp_path / "none.json").write_text("{}")
    line = ["sweep", "poisson", "--pages", "999", "--costs", str(tmp_path / "none.json")]
    assert "no calibrated costs" in failed(line, capsys, statuses=(1,))


def test_a_run_with_costs_shows_the_simulation_beside_the_engine(costs_file, tmp_path, capsys):
    line = ["run", "poisson", "--limit", "6", "--rate", "1000", "--num-pages", "64"]
    line += ["--time-scale", "0", "--out", str(tmp_path), "--costs", str(costs_file), "--engine"]
    said = failed([*line, f"{__name__}:other_engine"], capsys, statuses=(1,))
    assert "other programs: prefill_chunk 64 there and 32 here" in said
    assert main(["pressure", *line, f"{__name__}:make_engine"]) == 1  # some prompts are too long
    lines = [words for each in capsys.readouterr().out.splitlines() if (words := each.split())]
    figures = {words[0]: words[1:] for words in lines}
    assert figures["figure"] == ["engine", "simulated", "error"]
    assert len(figures["ttft_seconds_p99"]) == 3


def other_engine(*, num_pages, page_size, eviction):
    return tiny_engine(num_pages, page_size, vocab_size=VOCAB, prefill_chunk=32)
