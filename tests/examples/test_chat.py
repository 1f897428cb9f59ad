"""The chat: what it shows, where it stops, and how it goes on, here and in another process."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chat
import numpy as np
import pytest
from models import tokenizer

from paged_decode import Engine, SamplingParams
from paged_decode.errors import SnapshotMismatch

from .test_tokenizer import CHATML, byte_spelling
from .tiny_gguf import WIDTH, f32, gguf_bytes, interleaved, llama_metadata, llama_weights

GREEDY, DRAWN = (), ("--temperature", "0.9", "--top-p", "0.95", "--seed", "7")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def write_model(path: Path, *, template: str | None = CHATML, seed: int = 0) -> Path:
    """A model of random weights that has bytes and a few words to say."""
    words, merges = ["he", "ll", "hell", "hello", "é"], ["h e", "l l", "he ll", "hell o", "Ã ©"]
    words[-1] = "Ã©"  # its two bytes, as a byte-level vocabulary spells them
    tokens = ["<|im_start|>", "<|im_end|>", *byte_spelling(), *words]
    random, shape = np.random.default_rng(seed), (len(tokens), WIDTH)
    weights = llama_weights(seed, tied=False)
    for name in ("token_embd", "output"):
        weights[name] = random.standard_normal(shape).astype(np.float32)
    # What is no letter it never says, so that every answer is a line.
    weights["output"][[tokens.index(chr(256 + byte)) for byte in range(33)]] = 0
    metadata = llama_metadata(**{"llama.context_length": ("u32", 256)})
    metadata |= {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "gpt-2"),
        "tokenizer.ggml.tokens": ("array:string", tokens),
        "tokenizer.ggml.token_type": ("array:i32", [3, 3] + [1] * (len(tokens) - 2)),
        "tokenizer.ggml.merges": ("array:string", merges),
        "tokenizer.ggml.eos_token_id": ("u32", 1),
    }
    if template is not None:
        metadata["tokenizer.chat_template"] = ("string", template)
    tensors = {
        f"{name}.weight": f32(interleaved(w) if name.endswith(("attn_q", "attn_k")) else w)
        for name, w in weights.items()
    }
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


class Screen(io.StringIO):
    """Presses Ctrl-C whenever an answer was so many characters longer, so many times."""

    def __init__(self, every: int = 0, times: int = 0):
        super().__init__()
        self.every, self.times, self.heard = every, times, 0

    def write(self, text: str) -> int:
        super().write(text)
        if self.times and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            self.heard += len(text)
            if self.heard >= self.every:
                self.heard, self.times = 0, self.times - 1
                os.kill(os.getpid(), signal.SIGINT)
        return len(text)


@pytest.fixture
def talk(monkeypatch, tmp_path, capsys):
    """Types lines into a chat of its own; what it answered, and what it said beside that."""
    model = write_model(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)

    def talk(*lines: str, options: tuple[str, ...] = (), screen: Screen | None = None):
        screen = screen or Screen()
        args = ["chat.py", "--model", str(model), "--max-new", "40", "--page-size", "4", *options]
        monkeypatch.setattr(sys, "argv", args)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            chat.main()
        return screen.getvalue(), capsys.readouterr().err

    return talk


def engine_of(model: Path, words: tokenizer.Tokenizer) -> Engine:
    args = dict(dtype="float32", pages_dtype=None, devices=1, page_size=4, num_pages=None, draft=0)
    return chat.make_engine(argparse.Namespace(**args), model, words)


def said_by_an_engine(model: Path, messages: list[dict[str, str]]) -> str:
    """The greedy answer to a chat, without the program."""
    words = tokenizer.load(model)
    engine = engine_of(model, words)
    sampling = SamplingParams(40, stop_tokens=words.eos_ids)
    (done,) = engine.generate([words.encode_chat(messages)], sampling)
    assert done.text == words.decode(done.tokens)
    return done.text


def user(text: str) -> dict[str, str]:
    return dict(role="user", content=text)


def assistant(text: str) -> dict[str, str]:
    return dict(role="assistant", content=text)


def test_answers_are_those_of_the_whole_chat_and_earlier_turns_are_found(talk, tmp_path):
    out, err = talk("hello", "/stats", "é?", "/stats", "/new", "hello", "/quit", "never")
    first = said_by_an_engine(tmp_path / "m.gguf", [user("hello")])
    second = said_by_an_engine(tmp_path / "m.gguf", [user("hello"), assistant(first), user("é?")])
    assert len(first) > 5 and out == f"{first}\n{second}\n{first}\n"
    notes = [line for line in err.splitlines() if "prefix cache" in line or "computed" in line]
    found = [int(line.split("computed, ")[1].split()[0]) for line in notes]
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("options", [pytest.param(GREEDY, marks=pytest.mark.long), DRAWN])
def test_an_answer_goes_on_in_a_new_process_as_if_it_had_never_stopped(talk, tmp_path, options):
    whole, _ = talk("hello", "more", options=options)
    answer, later, _ = whole.split("\n")
    begun, err = talk("hello", "/save c.pgd", options=options, screen=Screen(every=5, times=1))
    assert answer.startswith(begun[:-1]) and len(begun) < len(answer) and "[stopped" in err
    script, model = Path(chat.__file__), tmp_path / "m.gguf"
    command = [sys.executable, str(script), "--model", str(model), "--max-new", "40"]
    done = subprocess.run(
        [*command, "--page-size", "4", *options],
        input="/load c.pgd\nmore\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == f"{answer}\n{later}\n", done.stderr
    assert "> hello" in done.stderr


@pytest.mark.parametrize(
    "options", [pytest.param(GREEDY, marks=pytest.mark.long), (*DRAWN, "--draft", "3")]
)
def test_an_answer_may_be_stopped_saved_and_loaded_anywhere(talk, options):
    answer = talk("hello", options=options)[0].removesuffix("\n")
    out, err = talk("hello", *("",) * 20, options=options, screen=Screen(every=3, times=20))
    assert out.replace("\n", "") == answer and err.count("[stopped") > 4
    lines = [line for i in range(6) for line in (f"/save {i}.pgd", f"/load {i}.pgd")]
    out, err = talk("hello", *lines, options=options, screen=Screen(every=9, times=20))
    shown = out.removesuffix("\n").split("\n")
    assert len(shown) == 7 and shown[-1] == answer and err.count("[stopped") > 2
    assert all(answer.startswith(each) for each in shown)


def test_another_question_ends_the_stopped_answer_where_it_is(talk, tmp_path):
    out, _ = talk("hello", "é?", "/go", screen=Screen(every=5, times=1))
    begun, second, _ = out.split("\n")
    messages = [user("hello"), assistant(begun), user("é?")]
    assert second == said_by_an_engine(tmp_path / "m.gguf", messages)


def test_what_goes_wrong_is_one_line_and_loses_nothing(talk, tmp_path):
    whole, _ = talk("hello", "more")
    other = write_model(tmp_path / "other.gguf", seed=1)
    talk(
        "hello", "/save other.pgd", options=("--model", str(other)), screen=Screen(every=5, times=1)
    )
    engine_of(other, tokenizer.load(other)).save("engine.pgd")
    (tmp_path / "text.pgd").write_text("hello")
    wrong = {
        "/nothing": "no command",
        "/save": "no command",
        "/load ": "no command",
        "/save none/c.pgd": "none",
        "/load none.pgd": "none.pgd",
        "/load text.pgd": "text.pgd",
        "/load engine.pgd": "not of a chat",
        "/load other.pgd": "fingerprint",
        "x" * 300: "SequenceTooLong",
        "\udcff": "TypeError",
    }
    out, err = talk("hello", *wrong, "/go", "more", screen=Screen(every=5, times=1))
    begun, rest, later, _ = out.split("\n")
    assert f"{begun}{rest}\n{later}\n" == whole
    said = [line for line in err.splitlines() if re.match(r"\[(?!stopped)\w+: ", line)]
    assert len(said) == len(wrong), err
    for line, message in zip(said, wrong.values(), strict=True):
        assert message in line


def test_pages_of_the_same_weights_under_another_configuration_are_refused(tmp_path):
    words = tokenizer.load(write_model(tmp_path / "m.gguf"))
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parent / "golden/smollm2", folder)
    config = json.loads((folder / "config.json").read_text())
    engine_of(folder, words).save(tmp_path / "c.pgd")
    engine_of(folder, words).restore(tmp_path / "c.pgd")
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnapshotMismatch, match="fingerprint"):
        engine_of(folder, words).restore(tmp_path / "c.pgd")


def test_a_model_that_cannot_chat_so_is_one_line_on_stderr(tmp_path):
    def refused(template: str | None, *options: str) -> str:
        model = write_model(tmp_path / "m.gguf", template=template)
        command = [sys.executable, chat.__file__, "--model", str(model), *options]
        done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and not done.stdout
        return line

    assert "no chat template" in refused(None)
    assert "m.gguf" in (line := refused(NO_SYSTEM, "--system", "Be brief.")) and "no system" in line
