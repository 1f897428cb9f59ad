"""A chat in the terminal. It can stop in mid-answer, be saved, and go on in a new process.

    python examples/chat.py
    python examples/chat.py --model ~/Qwen3-0.6B --temperature 0.7 --top-p 0.9 --system "Be brief."
    python examples/chat.py --dtype bfloat16 --pages-dtype int8 --draft 4

Answers go to stdout, all else to stderr, and lines may come from a pipe. What a later turn has in
common with those before it is found in the prefix cache; /stats says how much that was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import weights

import paged_decode as pd
from paged_decode._optional import needs
from paged_decode.errors import PagedDecodeError

with needs("examples", or_exit=True):
    from models import decoder, parallel, tokenizer

HELP = """\
Ctrl-C stops an answer: an empty line or /go goes on with it, and the next question ends it.
/save FILE keeps the chat with its pages, a stopped answer too; /load FILE goes on with it.
/new begins another chat. /stats says what was computed, and what was found. /quit   /help"""
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
MOST_TOKENS = 4096  # of a chat, if nobody says how many pages there are
EXPECTED = (PagedDecodeError, RuntimeError, TypeError, ValueError, OSError)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        metavar=f"DIR|FILE.gguf|{'|'.join(weights.RELEASES)}",
        help="default: smollm2",
    )
    parser.add_argument("--accept-terms", action="store_true", help="of use, of --model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-new", type=int, default=512, help="tokens of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="each answer has one of its own by it")
    parser.add_argument("--dtype", choices=DTYPES[:3], default="float32")
    parser.add_argument("--pages-dtype", choices=DTYPES, help="default: --dtype")
    parser.add_argument("--devices", type=int, default=1, help="split the model over so many")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page, a power of two")
    parser.add_argument("--num-pages", type=int, help=f"default: for {MOST_TOKENS} tokens")
    parser.add_argument("--draft", type=int, default=0, metavar="K", help="tokens guessed a step")
    args = parser.parse_args()
    if args.devices < 1:
        parser.error(f"--devices: expected at least 1, got {args.devices}")
    if args.draft and args.devices != 1:
        parser.error("--draft is for one device: the split model has logits of one token alone")
    return args


def fingerprint(path: Path, config: decoder.ModelConfig, dtype: str) -> bytes:
    """Tells what pages were computed with: weights, by the ends of their files, all that was read
    of the model beside them, and the dtype of both."""
    digest, edge = hashlib.sha256(f"{config!r} {dtype}".encode()), 1 << 20
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with part.open("rb") as file:
            digest.update(file.read(edge))
            file.seek(max(part.stat().st_size - edge, 0))
            digest.update(file.read())
    return digest.digest()


def make_engine(args: argparse.Namespace, path: Path, words: tokenizer.Tokenizer) -> pd.Engine:
    mesh = parallel.make_mesh(args.devices) if args.devices != 1 else None
    config, params = decoder.load(path, args.dtype, mesh=mesh, shown=weights.progress)
    sums: pd.DeviceSum | None = None
    if mesh is not None:
        sums = pd.DeviceSum(mesh, parallel.AXIS, width=config.width, dtype=args.dtype)
    model = decoder.make_model(config, every_token=bool(args.draft), mesh=mesh, sums=sums)
    where: dict[str, Any] = dict(mesh=mesh, head_axis=parallel.AXIS) if mesh else {}
    size, most = args.page_size, min(config.max_positions, MOST_TOKENS)
    pages = -(-most // size) + 1 if args.num_pages is None else args.num_pages
    dtype = args.pages_dtype or args.dtype
    layout = decoder.layout(config, page_size=size, num_pages=pages, dtype=dtype)
    shapes = pd.EngineConfig(
        max_rows=2,  # a chat that is loaded takes a row before the one before it gives up its own
        decode_steps=4,
        chunk_buckets=(16, 128),
        max_sequence_tokens=min(config.max_positions, (pages - 1) * size),
        vocab_size=config.vocab_size,
    )
    cache = pd.KVCache.create(layout=layout, **where)
    allocator = pd.BlockAllocator(layout, fingerprint=fingerprint(path, config, args.dtype))
    drafter = pd.PromptLookup(args.draft) if args.draft else None
    given = model, params, cache, allocator, shapes
    return pd.Engine(*given, drafter=drafter, detokenize=words.decode)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Chat:
    """One chat over an engine. A line that raises has changed nothing.

    Attributes:
      messages: what was said; the last is the user's while an answer is not whole.
      said: of that answer, the text so far.
      request: its id in the engine; None: all answers are whole.
    """

    def __init__(self, engine: pd.Engine, words: tokenizer.Tokenizer, args: argparse.Namespace):
        self.engine, self.words, self.args = engine, words, args
        self.system = [dict(role="system", content=args.system)] if args.system else []
        words.encode_chat([*self.system, dict(role="user", content="Hi")])  # may be refused
        self.messages, self.said, self.request = self.system, "", None

    def obey(self, line: str) -> None:
        """Do what was typed."""
        match line.strip().split(maxsplit=1):
            case ["/save", file]:
                kept = json.dumps([self.messages, self.said, self.request])
                self.engine.save(file, metadata={"chat": kept})
                note(f"[saved to {file}]")
            case ["/load", file]:
                self.load(file)
            case ["/new"]:
                self.become(self.system)
            case ["/stats"]:
                self.report()
            case ["/help"]:
                note(HELP)
            case ["/quit"]:
                raise EOFError  # as at the end of a pipe
            case [] | ["/go"]:
                if self.request is not None:
                    self.go()
            case [name, *_] if name.startswith("/"):
                raise ValueError(f"{line.strip()!r} is no command; /help lists them")
            case _:
                self.ask(line.strip())

    def turns(self) -> list[dict[str, str]]:
        """All that was said, of an answer that is not whole what there is."""
        half = dict(role="assistant", content=self.said)
        return self.messages + [half] * (self.request is not None)

    def become(self, messages: list[dict[str, str]], said: str = "", request: Any = None) -> None:
        """Go on with these turns; the answer that was stopped ends."""
        if self.request is not None:
            self.engine.cancel(self.request)
        self.messages, self.said, self.request = messages, said, request

    def ask(self, text: str) -> None:
        messages = [*self.turns(), dict(role="user", content=text)]
        sampling = pd.SamplingParams(
            self.args.max_new,
            self.args.temperature,
            top_p=self.args.top_p,
            seed=(self.args.seed + len(messages)) % 2**32,
            stop_tokens=self.words.eos_ids,
        )
        self.become(messages, "", self.engine.submit(self.words.encode_chat(messages), sampling))
        self.go()

    def load(self, file: str) -> None:
        kept = pd.inspect_snapshot(file).metadata.get("chat")
        try:
            found, said, request = json.loads(str(kept))
            messages = [dict(role=str(m["role"]), content=str(m["content"])) for m in found]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file} is a snapshot, but not of a chat") from None
        ids = self.engine.restore(file)
        self.become(messages, str(said), ids.get(request) if isinstance(request, int) else None)
        if len(self.turns()) > 1:
            question, answer = (each["content"] for each in self.turns()[-2:])
            note(f"> {question}")
            print(answer, end="\n" if self.request is None else "", flush=True)
        self.go()

    def go(self) -> None:
        """Show the answer as it comes, until it ends or is stopped."""
        stopped: list[int] = []  # looked at between two events, so that Ctrl-C loses none
        before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
        try:
            for event in self.engine.stream():
                if event.request_id == self.request:
                    self.hear(event)
                if stopped:
                    break
        finally:
            signal.signal(signal.SIGINT, before)
        if self.request is not None:
            print(flush=True)
            note("[stopped: an empty line goes on with it, /save FILE keeps it]")

    def hear(self, event: pd.TokenEvent) -> None:
        print(event.text, end="\n" if event.finish_reason else "", flush=True)
        self.said += event.text
        if event.finish_reason is not None:
            self.messages, self.said, self.request = self.turns(), "", None
        if event.finish_reason not in (None, "stop"):
            note(f"[ends with {event.finish_reason!r}{event.detail and ': '}{event.detail}]")

    def report(self) -> None:
        stats, pool = self.engine.stats, self.engine.allocator.stats()
        note(
            f"[{stats.prefill_tokens} prompt tokens computed, {stats.prefix_hit_tokens} found in "
            f"the prefix cache; {stats.decode_tokens} generated, {stats.draft_tokens} of them "
            f"guessed; {pool.used} of {pool.usable} pages used, {pool.evictable} cached]"
        )


def main() -> None:
    args = arguments()
    if args.devices > 1:  # only a CPU obeys: one process then shows as many devices
        jax.config.update("jax_num_cpu_devices", args.devices)
    path = weights.find(args.model, accept_terms=args.accept_terms)
    words = tokenizer.load(path)
    chat = Chat(make_engine(args, path, words), words, args)
    prompt = "> " if sys.stdin.isatty() else ""
    with suppress(ImportError):
        import_module("readline")  # lines can be edited then
    note(f"{path.name}: chats of up to {chat.engine.max_sequence_tokens} tokens; /help says more")
    while True:
        try:
            chat.obey(input(prompt))
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n[/quit leaves]")
        except EXPECTED as error:
            note(f"[{type(error).__name__}: {' '.join(str(error).split())}]")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        main()
    except EXPECTED as error:
        sys.exit(f"chat.py: {type(error).__name__}: {' '.join(str(error).split())}")
