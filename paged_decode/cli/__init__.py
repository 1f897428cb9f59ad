"""The console command `paged-decode`: a table of subcommands, each in its own module."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import MissingExtra, PagedDecodeError
from . import doctor, plan, pressure, snapshot
from ._options import Parser

__all__ = ["main"]

# A subcommand is a module with `add(subparsers)`; it sets `run`, which returns an exit status.
COMMANDS = (doctor, plan, snapshot, pressure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error that a message explains."""
    parser = Parser(
        prog="paged-decode",
        description="Tools for paged KV caches: backends, plans, snapshots, memory pressure.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except MissingExtra as error:
        print(f"paged-decode: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("paged-decode: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has enough, as `head` has; nor is the rest flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PagedDecodeError, OSError) as error:
        print(f"paged-decode: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
