"""The console command `paged-decode`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .pressure import command as pressure

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one subcommand."""
    parser = argparse.ArgumentParser(prog="paged-decode")
    subparsers = parser.add_subparsers(dest="command", required=True)
    pressure.add_parser(subparsers)
    args = parser.parse_args(argv)
    return args.main(args)
