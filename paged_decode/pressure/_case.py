"""One run of a sweep: everything that decides it, and how it is carried out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..allocator import BlockAllocator
from ..engine import EngineConfig
from ..policies import (
    FIFO,
    LFU,
    LRU,
    SLRU,
    Cheaper,
    CostAware,
    LastAdmitted,
    LeastComputed,
    LowestPriority,
    MostPages,
    MustFit,
    Recompute,
    ReuseAware,
    Swap,
    Watermark,
)
from ..tiers import HostTier
from ._values import as_number, as_whole
from .clairvoyant import Belady
from .costs import Roofline
from .fitted import Fitted
from .report import Report, as_json
from .sessions import agents, branches, rollouts
from .simulate import simulate
from .traces import read_azure, read_mooncake
from .workload import Request, chats, poisson, prefix_tree

__all__ = [
    "ADMISSIONS",
    "CARD",
    "CASE_FIELDS",
    "EVICTIONS",
    "MODEL",
    "PREEMPTIONS",
    "VICTIMS",
    "WORKLOADS",
    "Case",
    "check_workload",
    "curves",
    "read_workload",
    "store",
    "stored",
]

EVICTIONS = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "cost": CostAware,
    "reuse": ReuseAware,
    "belady": Belady,
}
VICTIMS = {
    "last": LastAdmitted,
    "least": LeastComputed,
    "most": MostPages,
    "priority": LowestPriority,
}
PREEMPTIONS = ("recompute", "swap", "cheaper")
ADMISSIONS = {"watermark": Watermark, "must-fit": MustFit}
WORKLOADS = (
    "mooncake:PATH",
    "azure:PATH",
    "poisson",
    "bursty",
    "chats",
    "tree",
    "samples",
    "agents",
    "branches",
    "rollouts",
)
MODEL = {
    "weight_bytes": (16e9, "bytes of weights, two for each weight"),
    "kv_bytes_per_token": (131072.0, "bytes of keys and values of a token in all layers"),
}
"""An 8B model in bfloat16 with 8 KV heads of 128 and 32 layers."""
CARD = {
    "bandwidth_bytes": (3e12, "bytes per second of device memory"),
    "flops": (6e14, "floating-point operations per second"),
}
"""What an H100 gets of its data sheet."""

_LAUNCH_SECONDS = 20e-6
_FORM = 3  # of the figures: files of an older one are not taken for a run's


@dataclass(frozen=True, slots=True)
class Case:
    """A workload, a pool, policies, goals and a device."""

    workload: str
    limit: int | None
    rate: float
    stretch: float
    seed: int
    pages: int
    page_size: int
    eviction: str
    victim: str
    preemption: str
    admission: str
    host_pages: int
    max_rows: int
    ttft: float
    per_token: float
    weight_bytes: float
    kv_bytes_per_token: float
    bandwidth_bytes: float
    flops: float
    link_bytes: float
    costs: str | None = None

    @property
    def key(self) -> str:
        """Names the run's file, so that a sweep that was cut off goes on."""
        text = f"{_FORM} {self!r}"
        kind, _, path = self.workload.partition(":")
        for each in (path, self.costs):
            text += hashlib.sha256(Path(each).read_bytes()).hexdigest() if each else ""
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def policy(self) -> str:
        """The policies that are not the plain ones."""
        names = {
            self.eviction: "lru",
            self.victim: "last",
            self.preemption: "recompute",
            self.admission: "watermark",
        }
        return "+".join(name for name, plain in names.items() if name != plain) or "lru"

    @property
    def model(self) -> str:
        """The model of the cost model, in words."""
        if self.costs is not None:
            return str(Fitted.read(self.costs).about.get("model", "not said"))
        known = ": 8B in bfloat16, 32 layers with 8 KV heads of 128" if self._has(MODEL) else ""
        size, token = self.weight_bytes / 1e9, self.kv_bytes_per_token
        return f"{size:g} GB of weights, {token:g} bytes of keys and values per token{known}"

    @property
    def card(self) -> str:
        """The card of the cost model, in words; the link to the host is a figure of its own."""
        if self.costs is not None:
            costs = Fitted.read(self.costs)
            errors = [fit.mean_residual for fit in costs.programs.values()]
            card, mean = costs.about.get("card", "a card"), sum(errors) / max(len(errors), 1)
            return f"measured on {card}: {len(errors)} programs, mean residual {mean:.1%}"
        known = ": what an H100 gets" if self._has(CARD) else ""
        memory, flops = self.bandwidth_bytes / 1e12, self.flops / 1e12
        launch = f"{_LAUNCH_SECONDS * 1e6:g} us a launch"
        return f"roofline of {memory:g} TB/s and {flops:g} TFLOP/s, {launch}{known}"

    def _has(self, values: dict[str, tuple[float, str]]) -> bool:
        return all(getattr(self, name) == value for name, (value, _) in values.items())

    def check(self) -> None:
        """Look at everything that does not depend on a request.

        Raises:
          ValueError: a value is not of its kind or range.
        """
        self._costs()
        if self.pages * self.page_size < 2:
            raise ValueError(
                f"expected pages for a prompt token and a generated one, got {self.pages} of "
                f"{self.page_size} tokens: more pages, or larger ones"
            )
        as_number("ttft", self.ttft)
        as_number("per_token", self.per_token)

    def figures(self) -> dict[str, Any]:
        """Simulate it: what tells it from others, the figures of its report, and its curves."""
        report = self.simulate()
        short = Path(self.workload).name if ":" in self.workload else self.workload
        names = ("workload", "policy", "pages", "page_size")
        first = {name: getattr(self, name) for name in names} | {"workload": short}
        about = {"card": self.card, "model": self.model} | asdict(self)
        for name in (*MODEL, *CARD) if self.costs is not None else ("costs",):
            del about[name]
        goodput = {"goodput": report.goodput(self.ttft, self.per_token)}
        return first | goodput | report.figures | about | first | curves(report)

    def simulate(self) -> Report:
        """Simulate it."""
        allocator = BlockAllocator(
            self.pages + 1,
            self.page_size,
            hash_key=b"pressure",
            eviction=EVICTIONS[self.eviction](),
        )
        costs, longest = self._costs(), min(131072, self.pages * self.page_size)
        if isinstance(costs, Fitted):
            config = replace(costs.config, max_sequence_tokens=longest)
        else:
            config = EngineConfig(
                max_rows=self.max_rows,
                decode_steps=8,
                prefill_chunk=2048,
                max_sequence_tokens=longest,
            )
        ways = {"recompute": Recompute(), "swap": Swap(), "cheaper": Cheaper(costs)}
        return simulate(
            read_workload(self.workload, self.limit, self.rate, self.stretch, self.seed),
            allocator,
            costs,
            config=config,
            victim=VICTIMS[self.victim](),
            tier=None if self.preemption == "recompute" else HostTier(self.host_pages),
            preemption=ways[self.preemption],
            admission=ADMISSIONS[self.admission](),
        )

    def _costs(self) -> Roofline | Fitted:
        if self.costs is not None:
            return Fitted.read(self.costs)
        return Roofline(
            weight_bytes=self.weight_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            flops_per_token=self.weight_bytes,  # two per weight of two bytes
            bandwidth_bytes=self.bandwidth_bytes,
            flops=self.flops,
            launch_seconds=_LAUNCH_SECONDS,
            page_size=self.page_size,
            link_bytes=self.link_bytes,
        )


CASE_FIELDS = tuple(field.name for field in fields(Case))


def curves(report: Report) -> dict[str, Any]:
    """What a report has more than one value of, as JSON takes it."""
    return {
        "lifetimes": list(report.lifetimes),
        "timeline": {name: list(values) for name, values in report.timeline.items()},
        "ttft_quantiles": report.ttft_quantiles(),
        "unfit_requests": [record.request_id for record in report.unfit],
    }


def store(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of a run, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(as_json({"digest": _digest(figures), **figures}), "utf-8")
    part.replace(path)


def stored(path: Path) -> dict[str, Any] | None:
    """The figures of an earlier run; None if there are none, or somebody changed the file."""
    try:
        figures = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(figures, dict) and figures.pop("digest", None) == _digest(figures)
    return figures if whole else None


def _digest(figures: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()


def read_workload(
    workload: str, limit: int | None, rate: float, stretch: float, seed: int
) -> Iterable[Request]:
    """The requests that a word of the command line stands for, `stretch` times as far apart.

    Raises:
      ValueError: it stands for none; limit is less than 1, or rate or stretch not above 0.
    """
    kind, _, path = workload.partition(":")
    count = 1000 if limit is None else as_whole("limit", limit, 1)
    stretch = as_number("stretch", stretch)
    generated = {
        "poisson": lambda: poisson(count, rate, seed=seed),
        "bursty": lambda: poisson(count, rate, seed=seed, burst=8.0),
        "samples": lambda: poisson(count, rate, seed=seed, samples=4),
        "chats": lambda: chats(-(-count // 4), rate / 4, seed=seed),
        "tree": lambda: prefix_tree(count, rate, seed=seed),
        "agents": lambda: agents(count, rate / 8, seed=seed),
        "branches": lambda: branches(-(-count // 8), rate / 8, seed=seed),
        "rollouts": lambda: rollouts(-(-count // 8), seed=seed),
    }
    readers = {"mooncake": read_mooncake, "azure": read_azure}
    check_workload(workload)
    requests = readers[kind](path) if path else generated[kind]()
    chosen = islice(requests, limit if path else count)
    return (replace(r, arrival_seconds=stretch * r.arrival_seconds) for r in chosen)


def check_workload(workload: str) -> None:
    """Raise ValueError unless it is one of `WORKLOADS`, with a path where one belongs."""
    kind, colon, path = workload.partition(":")
    if f"{kind}:PATH" not in WORKLOADS if colon and path else workload not in WORKLOADS:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
