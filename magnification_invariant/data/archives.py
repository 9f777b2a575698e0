"""BreaKHis as an archive: its members are looked at, then `datasets` downloads and unpacks it, once, into the cache."""

import gzip
import hashlib
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from magnification_invariant.files import cache_root, locked, whole

LIMIT = 64 * 2**20  # bytes that one member may have (an original image has half a million), and any archive in all
_RATIO = 20  # what a larger archive may inflate to, times its own size: compressed images hardly shrink further
_HEADER = 2**20  # bytes that a header may claim; a name is far shorter
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, RuntimeError, struct.error)


def unpacked(source: str | os.PathLike) -> Path:
    """Folder in the cache of what a .tar, .tar.gz or .zip holds, here or behind a URL; made anew when that changes.

    Raises:
        ValueError: It is no archive, is damaged, or has a member that could do harm; nothing was unpacked.
        FileNotFoundError: A URL cannot be reached.
    """
    from datasets import DownloadConfig, DownloadManager

    is_url = re.match("https?://", str(source))
    state = _server_says(str(source)) if is_url else (os.path.abspath(source), *_size_and_time(source))
    folder = cache_root() / "archives" / hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    with locked(folder, wait=True):
        if not folder.is_dir():
            # `datasets` takes an unpacking that was cut for a whole one, and an older archive of that name for this.
            with whole(folder) as unfinished:
                manager = DownloadManager(download_config=DownloadConfig(cache_dir=unfinished, disable_tqdm=True))
                archive = manager.download(str(source))  # one that is here is left where it is
                try:
                    _check_members(archive, source)
                    Path(manager.extract(archive)).rename(unfinished / "images")
                except _DAMAGE as error:
                    why = "checksum" if "CRC" in str(error) else f"not a whole .tar, .tar.gz or .zip archive: {error}"
                    raise ValueError(f"{source} is damaged ({why}), download it again.") from error
                if is_url:
                    os.unlink(archive)
    return folder / "images"


def _size_and_time(path: str | os.PathLike) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def _server_says(url: str) -> list:
    """What tells one state of a URL from another."""
    import aiohttp
    import fsspec

    telling = ("name", "size", "ETag", "Content-MD5", "Digest", "Last-Modified")
    filesystem, path = fsspec.url_to_fs(url)
    try:
        return sorted((name, value) for name, value in filesystem.info(path).items() if name in telling)
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise FileNotFoundError(f"{url} cannot be reached ({error}); download it and pass the file.") from error


def _check_members(path: str, source: str | os.PathLike) -> None:
    """Refuses an archive by what its members claim to be, and a gzip stream by its checksum; writes nothing."""
    limit, total = max(LIMIT, _RATIO * os.path.getsize(path)), 0
    for name, size, problem in _zip_members(path) if _is_zip(path) else _tar_members(path, limit):
        total += size + 512  # a header is something, too
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            problem = f"{name!r} leads out of it"
        elif "\0" in name:
            problem = f"{name!r} hides its real name"
        elif "\\" in name:
            problem = f"{name!r} has backslashes, as some programs of Windows write them: unpack it, pass the folder"
        elif size > LIMIT or size < 0:
            problem = f"{name!r} has {size / 2**20:,.0f} MiB, no image has more than {LIMIT / 2**20:.0f}"
        elif total > limit:
            problem = f"it inflates to more than {limit / 2**20:,.0f} MiB, far beyond its own size"
        if problem:
            raise ValueError(f"The archive {source} is refused: {problem}. Nothing of it was unpacked.")


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and tarfile.is_tarfile(path):  # `datasets` would unpack the other one than was looked at
        raise tarfile.ReadError("it is a tar and a zip at once")
    return is_zip


def _zip_members(path: str) -> Iterator[tuple[str, int, str | None]]:
    """Name, size and what is wrong of each member. Reading one ends at the size it claims, then its CRC is compared."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            problem = None
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                problem = f"{info.filename!r} is a link or device"
            elif info.compress_size > 1.01 * info.file_size + 1024:  # more than any packing adds
                problem = f"{info.filename!r} is larger than the {info.file_size:,} bytes that it says"
            yield info.orig_filename, info.file_size, problem  # as stored: `filename` was cut at a NUL


def _tar_members(path: str, limit: int) -> Iterator[tuple[str, int, str | None]]:
    """The same of a tar, which is then read to its end, where gzip has its checksum."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rb") as file:
        blocks = _Blocks(file)
        with tarfile.open(fileobj=blocks, mode="r:") as archive:
            for member in archive:
                regular = member.isreg() or member.isdir()
                yield member.name, member.size, None if regular else f"{member.name!r} is a link or device"
        if blocks.last.strip(b"\0") or not blocks.last:
            raise tarfile.ReadError("it has no end")  # tarfile itself ends at a damaged header, without a word
        while file.read(2**20):
            if file.tell() > 2 * limit:
                yield "", 0, "it inflates far beyond its own size"


class _Blocks:
    """A file as `tarfile` reads headers, none of which can claim gigabytes of memory."""

    def __init__(self, file):
        self.file, self.last, self.seek, self.tell = file, b"", file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self.file.read(size)
        return self.last
