"""Images in a .tar, .tar.gz or .zip, local or behind a URL: looked through before anything is decoded, never unpacked.

An archive is refused as a whole when one member could do harm: a path that leads out of it, a link or device, or
contents that inflate far beyond what the archive weighs.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from magnification_invariant.data.images import SUFFIXES

LIMIT = 64 * 2**20  # bytes that one member may have (an original image has half a million), and any archive in all
_RATIO = 20  # what a larger archive may inflate to, times its own size: compressed images hardly shrink further


def is_image(path: str) -> bool:
    """Whether a member is an image and neither hidden nor in a hidden folder (macOS adds such twins)."""
    path = PurePosixPath(path)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts if part != ".")
    return path.suffix.lower() in SUFFIXES and not hidden


def list_images(path: str | os.PathLike) -> list[str]:
    """Members of a local archive that are images, after all members have been checked; nothing is decoded.

    Raises:
        ValueError: the file is no archive, is damaged, or has a member that could do harm.
    """
    return [name for name, _ in _members(str(path), ()) if is_image(name)]


def read_images(path_or_url: str, wanted: Collection[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of the images that are `wanted` (all by default), in the order of the archive.

    Members are checked as they come, for an archive that cannot be looked through before.

    Raises:
        ValueError: as for `list_images`.
    """
    for name, content in _members(path_or_url, wanted):
        if content is not None:
            yield name, content


def _members(path_or_url: str, wanted: Collection[str] | None) -> Iterator[tuple[str, bytes | None]]:
    """Every member file; with its content if it is an image and wanted."""
    import fsspec

    def is_wanted(name: str) -> bool:
        return is_image(name) and (wanted is None or name in wanted)

    with fsspec.open(path_or_url, "rb") as file:
        guard = _Guard(path_or_url, getattr(file, "size", None) or 2**32)  # not every server tells; the original's
        try:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"PK":
                yield from _zip_members(file, guard, is_wanted)
            else:
                inflated = gzip.GzipFile(fileobj=file) if magic[:2] == b"\x1f\x8b" else file
                yield from _tar_members(inflated, guard, is_wanted)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path_or_url} is not a whole .tar, .tar.gz or .zip archive ({type(error).__name__}: {error}); "
                "download it again"
            ) from error


def _zip_members(file: BinaryIO, guard: "_Guard", is_wanted) -> Iterator[tuple[str, bytes | None]]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        for info in infos:
            mode = info.external_attr >> 16
            odd = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
            # The name as stored: `filename` was cut at a NUL, and its separators changed on Windows.
            guard.check(info.orig_filename, info.file_size, "a link or device" if odd else None)
        for info in infos:
            if not info.is_dir():
                yield info.filename, archive.read(info) if is_wanted(info.filename) else None


def _tar_members(file: BinaryIO, guard: "_Guard", is_wanted) -> Iterator[tuple[str, bytes | None]]:
    with tarfile.open(fileobj=_Limited(file, guard), mode="r|") as archive:
        for member in archive:
            odd = None if member.isreg() or member.isdir() else "a link or device"
            guard.check(member.name, member.size, odd)
            if member.isreg():
                yield member.name, archive.extractfile(member).read() if is_wanted(member.name) else None


class _Guard:
    """Refuses an archive by what its members claim to be."""

    def __init__(self, path: str, size: int):
        self.path = path
        self.limit = max(LIMIT, _RATIO * size)
        self.total = 0

    def check(self, name: str, size: int, odd: str | None) -> None:
        self.total += size
        if odd:
            self.refuse(f"{name!r} is {odd}")
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            self.refuse(f"{name!r} leads out of it")
        if "\0" in name:
            self.refuse(f"{name!r} hides its real name")
        if size > LIMIT:
            self.refuse(f"{name!r} has {size / 2**20:,.0f} MiB, no image has more than {LIMIT / 2**20:.0f}")
        if self.total > self.limit:
            self.refuse(f"it inflates to more than {self.limit / 2**20:,.0f} MiB, far beyond its own size")

    def refuse(self, why: str) -> None:
        raise ValueError(f"The archive {self.path} is refused: {why}. Nothing of it was decoded; get a clean copy.")


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than the archive may hold, whatever its headers say."""

    def __init__(self, file: BinaryIO, guard: _Guard):
        self.file, self.guard = file, guard
        self.left = 2 * guard.limit  # headers and padding are not counted by the guard

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            self.guard.refuse("it inflates far beyond its own size")
        return content
