"""Where every benchmark writes: one JSON form, one folder."""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "cpu_name", "spread", "write_result"]

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The model of the CPU and the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{model}, {cores} cores"


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum of repeated timings, in seconds, as a record has them."""
    times = sorted(seconds)
    return {"median_s": statistics.median(times), "min_s": times[0], "max_s": times[-1]}


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def write_result(
    name: str,
    records: Sequence[dict[str, Any]],
    *,
    command: str,
    device: str | None = None,
    packages: Sequence[str] = ("numpy", "jax", "jaxlib"),
) -> Path:
    """Write `results/<name>.json` and return its path.

    Args:
      name: of the benchmark, and of the file.
      records: each `{"case": {...}, "system": "...", "median_s": ..., "min_s": ..., "max_s": ...}`
        and whatever else belongs to it, with units in the names.
      command: what to type to get the file again.
      device: an accelerator, as `jax.Device.device_kind` names it; None is the CPU.
      packages: distributions whose versions matter, of those that are installed.
    """
    result = {
        "benchmark": name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device or cpu_name(),
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages if _is_installed(package)},
        "records": list(records),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path
