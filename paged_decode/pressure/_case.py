"""One run of a sweep: everything that decides it, and how it is carried out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    Swap,
    Watermark,
)
from ..tiers import HostTier
from .costs import Roofline
from .report import Report
from .simulate import simulate
from .traces import read_azure, read_mooncake
from .workload import Request, chats, poisson, prefix_tree

__all__ = [
    "ADMISSIONS",
    "EVICTIONS",
    "PREEMPTIONS",
    "VICTIMS",
    "WORKLOADS",
    "Case",
    "check_workload",
    "read_workload",
]

EVICTIONS = {"lru": LRU, "fifo": FIFO, "lfu": LFU, "slru": SLRU, "cost": CostAware}
VICTIMS = {
    "last": LastAdmitted,
    "least": LeastComputed,
    "most": MostPages,
    "priority": LowestPriority,
}
PREEMPTIONS = ("recompute", "swap", "cheaper")
ADMISSIONS = {"watermark": Watermark, "must-fit": MustFit}
WORKLOADS = ("mooncake:PATH", "azure:PATH", "poisson", "bursty", "chats", "tree", "samples")


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

    @property
    def key(self) -> str:
        """Names the run's file, so that a sweep that was cut off goes on."""
        text = repr(self)
        kind, _, path = self.workload.partition(":")
        if path:
            text += hashlib.sha256(Path(path).read_bytes()).hexdigest()
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

    def figures(self) -> dict[str, Any]:
        """Simulate it: the figures of its report, and what tells it from others."""
        report = self.simulate()
        about = {
            "workload": Path(self.workload).name if ":" in self.workload else self.workload,
            "policy": self.policy,
            "pages": self.pages,
            "page_size": self.page_size,
            "link_bytes": self.link_bytes,
        }
        goodput = report.goodput(self.ttft, self.per_token)
        return about | {"goodput": goodput} | report.figures | {"lifetimes": report.lifetimes}

    def simulate(self) -> Report:
        """Simulate it."""
        allocator = BlockAllocator(
            self.pages + 1,
            self.page_size,
            hash_key=b"pressure",
            eviction=EVICTIONS[self.eviction](),
        )
        config = EngineConfig(
            max_rows=self.max_rows,
            decode_steps=8,
            prefill_chunk=2048,
            max_sequence_tokens=min(131072, self.pages * self.page_size),
        )
        costs = Roofline(
            weight_bytes=self.weight_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            flops_per_token=self.weight_bytes,  # two per weight of two bytes
            bandwidth_bytes=self.bandwidth_bytes,
            flops=self.flops,
            launch_seconds=20e-6,
            page_size=self.page_size,
            link_bytes=self.link_bytes,
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


def read_workload(
    workload: str, limit: int | None, rate: float, stretch: float, seed: int
) -> Iterable[Request]:
    """The requests that a word of the command line stands for, `stretch` times as far apart.

    Raises:
      ValueError: it stands for none.
    """
    kind, _, path = workload.partition(":")
    count = limit or 1000
    generated = {
        "poisson": lambda: poisson(count, rate, seed=seed),
        "bursty": lambda: poisson(count, rate, seed=seed, burst=8.0),
        "samples": lambda: poisson(count, rate, seed=seed, samples=4),
        "chats": lambda: chats(-(-count // 4), rate / 4, seed=seed),
        "tree": lambda: prefix_tree(count, rate, seed=seed),
    }
    readers = {"mooncake": read_mooncake, "azure": read_azure}
    check_workload(workload)
    requests = islice(readers[kind](path), limit) if path else generated[kind]()
    return (replace(r, arrival_seconds=stretch * r.arrival_seconds) for r in requests)


def check_workload(workload: str) -> None:
    """Raise ValueError unless it is one of `WORKLOADS`, with a path where one belongs."""
    kind, colon, path = workload.partition(":")
    if f"{kind}:PATH" not in WORKLOADS if colon and path else workload not in WORKLOADS:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
