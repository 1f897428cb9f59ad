"""What pyproject.toml cannot say: links of README.md for an index page, symlinks for an sdist."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
LINK = re.compile(r"(!?)(\[[^]\[]*\])\((?!\w+:|#)([^)\s]+)\)")


def for_index_page(text: str) -> str:
    """Markdown in which what lies in the repository is named by address: pages, and pictures."""
    return LINK.sub(
        lambda link: f"{link[1]}{link[2]}({HOME}/{'raw' if link[1] else 'blob'}/main/{link[3]})",
        text,
    )


class SdistLikeCheckout(sdist):
    """With the symlinks by which `paged_decode.kernels` is found where nothing is installed."""

    def make_release_tree(self, base_dir: str, files: Sequence[str]) -> None:
        super().make_release_tree(base_dir, files)
        for room in ("allocator", "kernels"):
            os.symlink(f"../{room}", f"{base_dir}/paged_decode/{room}", target_is_directory=True)


setup(
    long_description=for_index_page((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    cmdclass={"sdist": SdistLikeCheckout},
)
