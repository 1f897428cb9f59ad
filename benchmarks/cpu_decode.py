"""CPU decode of SmolLM2-135M in float32: paged-decode against transformers and torch.

    python benchmarks/cpu_decode.py --peer-python PYTHON_WITH_TORCH

Same weights, same prompts, same cores. Each side loads once in a process of its own and then waits;
they take turns, in the opposite order every other round. "decode" is the wall time from the first
tokens to the last, "whole" begins with the prompts. The peer runs four ways (its own generate() and
a hand-written loop, sdpa and eager attention); the summary names its best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _result import spread, write_result
from _transformers_peer import VARIANTS, TransformersPeer

ROOT = Path(__file__).resolve().parents[1]

OURS = "paged-decode/xla"
LENGTHS = {1: [64], 8: [5, 16, 31, 48, 64, 90, 128, 200]}
TEXT = """The harbour had two walls and one light. In the evening the boats came in, low in the
water, and the gulls argued above them until the last crate stood on the quay. An old man counted
the crates, wrote the number on a slate, wiped it off again and wrote it once more, because he did
not trust numbers that had been written only once. Behind him the town climbed the hill in steps of
grey stone. Nobody could say who had built the stairs, but everybody knew how many there were: four
hundred and twelve, or four hundred and eleven if one did not count the broken one beside the well.
When the wind turned to the north the shutters were closed from the bottom of the town to the top,
one after the other, so that a stranger on the water could believe that somebody was putting the
houses out. Then only the light was left, and the sound of the chain that held the harbour shut."""


class PagedDecode:
    """The engine: one per batch size, compiled before it is timed."""

    def __init__(self, gguf: Path):
        from models import decoder

        self.config, self.params = decoder.load(gguf)
        self.model = decoder.make_model(self.config)
        self.engines: dict[tuple[int, int], Any] = {}

    def run(self, variant: str, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Generate `new` tokens per prompt: the tokens, and the seconds of both phases."""
        from paged_decode import SamplingParams

        engine = self._engine(len(prompts), max(map(len, prompts)), new)
        start = time.perf_counter()
        ids = [engine.submit(p, SamplingParams(max_new_tokens=new)) for p in prompts]
        tokens: dict[int, list[int]] = {i: [] for i in ids}
        decode_start, before = start, 0
        while not engine.idle:
            for event in engine.step():
                tokens[event.request_id].append(event.token)
            if not before and all(tokens.values()):  # every prompt has its first tokens
                decode_start, before = time.perf_counter(), sum(map(len, tokens.values()))
        end = time.perf_counter()
        return {
            "tokens": [tokens[i] for i in ids],
            "decode_s": end - decode_start,
            "decode_tokens": new * len(prompts) - before,
            "whole_s": end - start,
        }

    def _engine(self, rows: int, longest: int, new: int) -> Any:
        from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache

        if (rows, longest) in self.engines:
            return self.engines[rows, longest]
        page_size = 16
        pages = 1 + rows * -(-(longest + new) // page_size)
        cache = KVCache.create(
            num_layers=self.config.num_layers,
            num_pages=pages,
            num_kv_heads=self.config.num_kv_heads,
            page_size=page_size,
            head_dim=self.config.head_dim,
        )
        # Rounds repeat the prompts; with a prefix cache they would not be computed again.
        allocator = BlockAllocator(pages, page_size, prefix_cache=False)
        shapes = EngineConfig(
            max_rows=rows,
            row_buckets=(rows,),
            prefill_chunk=longest,  # all prompts in one visit: then every row decodes together
            max_sequence_tokens=longest + new,
        )
        engine = Engine(self.model, self.params, cache, allocator, shapes)
        engine.warmup()
        self.engines[rows, longest] = engine
        return engine


# ---- one side, in a process of its own


def serve(side: str, gguf: Path) -> None:
    """Load one system, then answer lines of JSON until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr
    system = PagedDecode(gguf) if side == "ours" else TransformersPeer(gguf)
    print(json.dumps({"versions": versions(), "cores": cores()}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(system.run(**json.loads(line))), file=channel, flush=True)


def versions() -> dict[str, str]:
    from importlib import metadata

    names = ("jax", "torch", "transformers", "numpy")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


class Side:
    """The other end of `serve`."""

    def __init__(self, side: str, python: str, gguf: Path):
        command = [python, __file__, "--serve", side, "--gguf", str(gguf)]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._answer()

    def run(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return json.loads(line)


# ---- both, in turn


def measure(args: argparse.Namespace, gguf: Path) -> list[dict[str, Any]]:
    sides = {OURS: Side("ours", sys.executable, gguf)}
    peer = Side("peer", args.peer_python, gguf)
    sides |= {variant: peer for variant in VARIANTS}
    if len({tuple(side.about["cores"]) for side in sides.values()}) != 1:
        raise SystemExit("the two sides run on different cores")
    records = []
    for batch, prompts in make_prompts(gguf).items():
        runs: dict[str, list[dict[str, Any]]] = {system: [] for system in sides}
        for turn in range(args.rounds + 1):  # the first is for warming up, and for the comparison
            for system in list(sides)[:: 1 if turn % 2 else -1]:
                got = sides[system].run(variant=system, prompts=prompts, new=args.new)
                if turn:
                    runs[system].append(got)
                print(
                    f"batch {batch}, round {turn}, {system}: {rate(got):.1f} tokens/s", flush=True
                )
        records += make_records(batch, prompts, args.new, runs, sides)
    return records


def rate(run: dict[str, Any]) -> float:
    return run["decode_tokens"] / run["decode_s"]


def make_prompts(gguf: Path) -> dict[int, list[list[int]]]:
    from models import tokenizer

    ids = tokenizer.load(gguf).encode(" ".join(TEXT.split()))
    return {
        batch: [ids[row : row + length] for row, length in enumerate(lengths)]
        for batch, lengths in LENGTHS.items()
    }


def make_records(batch, prompts, new, runs, sides) -> list[dict[str, Any]]:
    """One record per system and phase; seconds are per token and row, that is per step."""
    expected = runs[OURS][0]["tokens"]
    records = []
    for system, done in runs.items():
        same = [
            g == e for r in done for g, e in zip(flat(r["tokens"]), flat(expected), strict=True)
        ]
        for phase in ("decode", "whole"):
            steps = [(r["decode_tokens"] / batch if phase == "decode" else new) for r in done]
            seconds = [r[f"{phase}_s"] / n for r, n in zip(done, steps, strict=True)]
            times = spread(seconds)
            records.append(
                {
                    "case": {
                        "batch": batch,
                        "phase": phase,
                        "prompt_tokens": [len(p) for p in prompts],
                        "new_tokens": new,
                        "dtype": "float32",
                        "cores": len(cores()),
                    },
                    "system": system,
                    **times,
                    "tokens_per_s": batch / times["median_s"],
                    "same_tokens_as_ours": sum(same) / len(same),
                    "versions": sides[system].about["versions"],
                }
            )
    return records


def flat(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def summary(records: list[dict[str, Any]]) -> None:
    for batch in LENGTHS:
        for phase in ("decode", "whole"):
            here = [
                r for r in records if (r["case"]["batch"], r["case"]["phase"]) == (batch, phase)
            ]
            ours = next(r for r in here if r["system"] == OURS)
            best = max((r for r in here if r is not ours), key=lambda r: r["tokens_per_s"])
            print(
                f"batch {batch} {phase:6}  {OURS} {ours['tokens_per_s']:.1f} tokens/s, "
                f"{best['system']} {best['tokens_per_s']:.1f}: "
                f"{ours['tokens_per_s'] / best['tokens_per_s']:.2f}x "
                f"({100 * best['same_tokens_as_ours']:.0f} % the same tokens)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate per prompt")
    parser.add_argument("--gguf", type=Path, help="default: SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--serve", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve != "peer":
        sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    if args.serve:
        return serve(args.serve, args.gguf)
    import weights

    records = measure(args, args.gguf or weights.fetch())
    path = write_result("cpu_decode", records, command="python benchmarks/cpu_decode.py")
    summary(records)
    print(path)


if __name__ == "__main__":
    main()
