"""The file operations of a save, behind one small object, so that tests can fail any of them."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

try:
    import fcntl
except ImportError:  # Windows: an abandoned file stays until it is deleted by hand
    fcntl = None

__all__ = ["Files", "OSFiles", "open_for_reading", "replacing"]

# A sibling that was just made may not be locked yet; a writer that lives holds its lock however
# old the file is, so this need not be as long as a save can take.
_ABANDONED_SECONDS = 60


@runtime_checkable
class Files(Protocol):
    """What a save asks of the operating system. Any of it may raise OSError."""

    def create(self, path: Path) -> int:
        """Make a new file, readable and writable by its owner only; returns its descriptor."""
        ...

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write at an offset; returns how many bytes were taken, perhaps not all."""
        ...

    def fsync(self, file: int) -> None:
        """Return when the file's bytes are on the disk."""
        ...

    def close(self, file: int) -> None: ...

    def rename(self, source: Path, target: Path) -> None:
        """Put the source in the place of the target, in one step."""
        ...

    def fsync_folder(self, folder: Path) -> None:
        """Return when the folder's names are on the disk."""
        ...

    def remove(self, path: Path) -> None: ...


class OSFiles:
    """The real ones."""

    def create(self, path: Path) -> int:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # held as long as the writer lives
        return file

    def write(self, file: int, data: memoryview, offset: int) -> int:
        taken = os.pwrite(file, data, offset)
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write these bytes to the disk, and fsync finds little left to do.
            with suppress(OSError):  # a hint only
                os.posix_fadvise(file, offset, taken, os.POSIX_FADV_DONTNEED)
        return taken

    def fsync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def fsync_folder(self, folder: Path) -> None:
        if os.name == "nt":  # a folder cannot be opened there
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        os.unlink(path)


DEFAULT: Files = OSFiles()
"""What every save uses; tests put one here that fails."""

_BINARY = getattr(os, "O_BINARY", 0)


def write_all(files: Files, file: int, data: memoryview, offset: int) -> None:
    """Write every byte, however few are taken at a time."""
    while len(data):
        taken = files.write(file, data, offset)
        if taken <= 0:
            raise OSError("the file takes no more bytes")
        data, offset = data[taken:], offset + taken


@contextmanager
def replacing(path: str | os.PathLike[str], files: Files) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `path` when the block ends well.

    ```
    create a sibling, mode 0600 -> write -> fsync -> rename over path -> fsync the folder
    ```

    Up to the rename whoever opens `path` sees the old file, from then on the new one. If anything
    raises, the sibling is removed. What a killed writer left behind is swept by a later one.
    """
    target = _checked_target(path)
    _sweep(target)
    sibling = target.with_name(f"{_sibling_front(target)}{os.getpid()}-{secrets.token_hex(8)}.tmp")
    renamed = False
    try:
        file = files.create(sibling)
        try:
            yield file
            files.fsync(file)
        finally:
            files.close(file)
        files.rename(sibling, target)  # only after fsync: else a name could outlive its bytes
        renamed = True
        files.fsync_folder(target.parent)
    except BaseException as error:
        if not renamed:
            with suppress(OSError):
                files.remove(sibling)
        if isinstance(error, OSError):
            message = str(error.strerror or error)
            if renamed:
                message += "; the new file is in place, but may not survive a power loss"
            raise OSError(error.errno or 0, message, str(path)) from error
        raise


def _checked_target(path: str | os.PathLike[str]) -> Path:
    """The file to replace: behind a symbolic link, what it points at."""
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(
                errno.EISDIR, "a snapshot is a file, this is a folder", str(path)
            )
        if not stat.S_ISREG(mode):
            raise OSError(
                errno.EINVAL, "a snapshot replaces a regular file, this is none", str(path)
            )
    return target


def _sweep(target: Path) -> None:
    """Remove siblings that a killed writer left: old, and locked by nobody."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(_sibling_front(target)) + r"[0-9]+-[0-9a-f]{16}\.tmp")
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if ours.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(target.parent / name)


def _sibling_front(target: Path) -> str:
    """How names of siblings begin: as much of the target's as leaves room for the rest."""
    return f".{os.fsdecode(os.fsencode(target.name)[:100])}."


def _remove_if_abandoned(path: Path) -> None:
    file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if time.time() - os.fstat(file).st_mtime > _ABANDONED_SECONDS and fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    finally:
        os.close(file)


def open_for_reading(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """A descriptor of a regular file; a pipe or device is refused instead of waited for.

    So is a symbolic link, unless links are to be followed.
    """
    flags = os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "a snapshot is a regular file, this is none", str(path))
    return file
