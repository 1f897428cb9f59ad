"""Tables of whole models: the example models, experts, rollouts and samples that share prompts.

Each is nothing, as long as no card has measured it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _tables import OURS, head, heading, line, load, measured

__all__ = ["example_models", "experts", "rollouts", "shared_prefix", "trainer_rollouts"]

MODELS = ("llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-20b")
KINDS = ("attention", "products", "sums", "rest")


def example_models() -> Iterator[str]:
    """Steps and prefill of the example models against what they must cost."""
    for name in MODELS:
        if not measured(f"example_models_{name}"):
            continue
        result = load(f"example_models_{name}")
        of_peer = {tuple(r["case"].items()): r for r in result["records"] if r["system"] != OURS}
        yield from heading(
            f"The example model with the shapes of {name}",
            result,
            ("jax", "triton", "jax-triton", "torch", "flashinfer-python"),
        )
        peer = "torch and FlashInfer" if len(of_peer) > 1 else None
        split = f"{', '.join(KINDS)}, ms"
        yield head("rows x tokens", "context", "time", "of the floor", split, *filter(None, [peer]))
        for record in result["records"]:
            if record["system"] != OURS:
                continue
            case, took, cells = record["case"], record["median_s"], []
            if peer:
                other = of_peer.get(tuple(case.items()), {})
                cells = [_ms(other["median_s"]) if "median_s" in other else "failed"]
            yield line(
                f"{case['rows']} x {case['tokens']}",
                str(case["context"]),
                _ms(took),
                f"{took / record['floor_s']:.2f}x",
                ", ".join(f"{record[f'{kind}_s'] * 1e3:.2f}" for kind in KINDS),
                *cells,
            )
        yield "\n"


def experts() -> Iterator[str]:
    """Grouped products against their floor and `jax.lax.ragged_dot`."""
    if not measured("grouped_matmul"):
        return
    result = load("grouped_matmul")
    yield from heading("Products of tokens with the experts that they chose", result,
                       ("jax", "triton", "jax-triton"))  # fmt: skip
    yield head("experts", "tokens", "`grouped_matmul`", "of the floor", "`jax.lax.ragged_dot`")
    for case, systems in _by_case(result):
        mine, peer = systems[OURS], systems.get("jax.lax.ragged_dot", {})
        yield line(
            case["experts"],
            str(case["tokens"]),
            _us(mine["median_s"]),
            f"{mine['median_s'] / mine['floor_s']:.2f}x",
            _us(peer["median_s"]) if "median_s" in peer else "failed",
        )
    yield "\n"


def shared_prefix() -> Iterator[str]:
    """Attention of samples that share prompts, with and without reading them together."""
    if not measured("shared_prefix"):
        return
    result = load("shared_prefix")
    yield from heading("Attention of 64 rows that share prompts", result,
                       ("jax", "triton", "flashinfer-python"))  # fmt: skip
    columns = ("alone", "shared", "gain", "finding who shares", "FlashInfer's cascade")
    yield head("prompts x samples", "prompt + own tokens", *columns)
    for case, systems in _by_case(result):
        alone, shared = (systems[f"{OURS}/{name}"]["median_s"] for name in ("alone", "shared"))
        peer = systems.get("flashinfer/cascade", {})
        yield line(
            f"{case['prompts']} x {case['samples']}",
            f"{case['prefix']} + {case['tail']}",
            _us(alone),
            _us(shared),
            f"{alone / shared:.2f}x",
            _us(systems[f"{OURS}/plan"]["median_s"]),
            _us(peer["median_s"]) if "median_s" in peer else "failed",
        )
    yield "\n"


def rollouts() -> Iterator[str]:
    """Engines with shared prefixes and with bits that no batch changes."""
    if not measured("rollouts"):
        return
    result = load("rollouts")
    case = result["records"][0]["case"]
    title = f"{case['prompts']} prompts of {case['prefix']} tokens, {case['samples']} samples each"
    yield from heading(f"{title}, {case['layers']} layers of a Llama", result, ("jax",))
    yield head("engine", "a step", "prefill", "equal bits")
    for record in result["records"]:
        same = record.get("same_bits", {})
        yield line(
            f"`{record['system'].partition('/')[2]}`",
            _ms(record["median_s"]),
            f"{record['prefill_s']:.2f} s",
            ", ".join(f"{name} {count}" for name, count in same.items()),
        )
    yield "\n"


def trainer_rollouts() -> Iterator[str]:
    """Rollouts and updates beside tunix's own sampler."""
    if not measured("trainer_rollouts"):
        return
    result = load("trainer_rollouts")
    yield from heading("Rollouts for a trainer", result, ("jax", "google-tunix"))
    yield head("system", "rollout", "tokens/s", "K and V, GB")
    for record in result["records"]:
        if "tokens_per_s" in record:
            yield line(
                record["system"],
                f"{record['median_s']:.2f} s",
                f"{record['tokens_per_s']:,.0f}",
                f"{record['kv_bytes'] / 1e9:.1f}",
            )
    yield "\n"
    yield head("engine", "in flight", "`update_params`")
    for record in result["records"]:
        if record["system"] == f"{OURS}/update":
            case = record["case"]
            yield line(f"`{case['engine']}`", case["in_flight"], _ms(record["median_s"]))
    yield "\n"


def _by_case(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every case, and its records by system."""
    found: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
    for record in result["records"]:
        _, systems = found.setdefault(tuple(record["case"].items()), (record["case"], {}))
        systems[record["system"]] = record
    yield from found.values()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
