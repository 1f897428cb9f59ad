"""Coverage-guided fuzzing of the snapshot reader, by hand or at night; not part of the suite.

    python -m tests.paged_decode.snapshot.fuzz --seconds 600 --json FILE

Needs `atheris` (extra `fuzz`). Any outcome but a sound snapshot or a `SnapshotError` is a finding.
An input is read twice: as it is, and with its lengths and checksums made right, so that the fields
and the bookkeeping are reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import zlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def child(corpus: str, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["paged_decode.snapshot", "paged_decode.allocator"]):
        from paged_decode.snapshot import (
            _files,
            compact_snapshot,
            inspect_snapshot,
            verify_snapshot,
        )
    from paged_decode.errors import SnapshotError

    class Unsynced(_files.OSFiles):
        def fsync(self, file: int) -> None: ...

        def fsync_folder(self, folder: Path) -> None: ...

    _files.DEFAULT = Unsynced()
    path = SCRATCH / f"paged-decode-fuzz-{os.getpid()}"
    folded = path.with_suffix(".folded")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            inspect_snapshot(path)
            verify_snapshot(path)
        except SnapshotError:
            return
        # What both accept, the third accepts too, and what it writes is sound.
        compact_snapshot(path, folded)

    def one(data: bytes) -> None:
        read(data)
        read(with_checksums(data))

    atheris.Setup([sys.argv[0], *options, corpus], one)
    atheris.Fuzz()


def with_checksums(data: bytes) -> bytes:
    """The same bytes with magic, version, lengths and every checksum made right if possible."""
    from paged_decode.snapshot import _format as f

    if len(data) < f.PREFIX.size:
        return data
    body_bytes = min(f.PREFIX.unpack_from(data)[2], len(data) - f.PREFIX.size)
    body = data[f.PREFIX.size : f.PREFIX.size + body_bytes]
    try:
        import msgpack

        fields = msgpack.unpackb(body)
        offset = f.aligned(f.PREFIX.size + len(body))
        for entry in fields["arrays"]:
            spec = f.ArraySpec(entry[0], entry[1], tuple(entry[2]))
            if not 0 <= spec.nbytes <= len(data):
                raise ValueError("nobody can make its checksums")
            chunks = [
                data[
                    offset + first : offset
                    + min(first + spec.chunk_rows * spec.row_bytes, spec.nbytes)
                ]
                for first in range(0, spec.nbytes, max(1, spec.chunk_rows * spec.row_bytes))
            ]
            entry[3] = b"".join(zlib.crc32(c).to_bytes(4, "little") for c in chunks)
            offset = f.aligned(offset + spec.nbytes)
        if offset < 1 << 20:
            body = msgpack.packb(fields)
            data = data[:offset].ljust(offset, b"\0")
    except Exception:  # whatever it is, the reader must say so, not this
        pass
    version = data[8] if data[9:12] == b"\0\0\0" and data[8] in (2, 3, 4, 5) else 1
    front = f.PREFIX.pack(f.MAGIC, version, len(body), len(data), 0)[:-4]
    crc = zlib.crc32(body, zlib.crc32(front))
    return front + crc.to_bytes(4, "little") + body + data[f.PREFIX.size + len(body) :]


def seeds(folder: Path) -> None:
    """The golden files are the first inputs."""
    for path in (ROOT / "tests" / "golden").glob("*.pgd"):
        (folder / path.name).write_bytes(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        command = [sys.executable, "-m", "tests.paged_decode.snapshot.fuzz", "--child", corpus]
        command += [f"-max_total_time={args.seconds}", "-max_len=32768", "-print_final_stats=1"]
        command += ["-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={corpus}/crash-"]
        run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        findings = [p.name for p in Path(corpus).glob("crash-*")]
        inputs = len(list(Path(corpus).iterdir())) - len(findings)
    text = run.stderr
    stats = {k: int(v) for k, v in re.findall(r"stat::(\w+):\s+(\d+)", text)}
    covered = re.findall(r"cov: (\d+) ft: (\d+)", text)
    result = {
        "benchmark": "snapshot_fuzz",
        "command": f"python -m tests.paged_decode.snapshot.fuzz --seconds {args.seconds}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{platform.machine()}, one process",
        "versions": {"python": platform.python_version(), "atheris": metadata.version("atheris")},
        "records": [
            {
                "case": {"seconds": args.seconds},
                "system": "paged-decode",
                "executed_inputs": stats.get("number_of_executed_units", 0),
                "kept_inputs": inputs,
                "covered_edges": int(covered[-1][0]) if covered else 0,
                "features": int(covered[-1][1]) if covered else 0,
                "peak_rss_mb": stats.get("peak_rss_mb", 0),
                "findings": len(findings),
                "exit_status": run.returncode,
            }
        ],
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if findings or run.returncode:
        sys.exit(text[-4000:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
