"""Files on this disk: written whole or not at all, by one process at a time; and where what can be made again lies."""

import glob
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout


def cache_root() -> Path:
    """Folder of everything that can be made again: ``MAGDG_CACHE``, else ``~/.cache/magnification_invariant``."""
    return Path(os.environ.get("MAGDG_CACHE") or "~/.cache/magnification_invariant").expanduser()


class CannotWrite(OSError):
    """A file could not be written; what stood there before still does."""


class Busy(OSError):
    """Another process writes there."""


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """The only way a file, or a folder of files, is written: under another name, flushed to the disk, then renamed.

    ::

        with whole("results.json") as unfinished:
            unfinished.write_text(...)  # or unfinished.mkdir() and files in it

    Args:
        path: What it is called once it is whole; what has that name is replaced then. Its folder is made if needed.

    Yields:
        The name to write to, in the same folder, hidden. Nothing of that name is left if the block fails.

    Raises:
        CannotWrite: The disk is full or read-only, ...: names the path and the reason.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        for file in unfinished.rglob("*") if unfinished.is_dir() else [unfinished]:
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        replaced = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
        if path.is_dir():  # a folder cannot be replaced by one: it steps aside, and comes back if that fails
            os.replace(path, replaced)
        try:
            os.replace(unfinished, path)
        except OSError:
            if replaced.is_dir():
                os.replace(replaced, path)
            raise
        _remove(replaced)
    except BaseException as error:
        _remove(unfinished)
        # safetensors and torch report a full disk as errors of their own
        of_the_disk = isinstance(error, OSError) or "I/O error" in str(error) or "unexpected pos" in str(error)
        if of_the_disk and not isinstance(error, CannotWrite | FileNotFoundError | Busy):
            why = getattr(error, "strerror", None) or error
            raise CannotWrite(
                f"cannot write {path}: {why}. What was there before is kept; make room, or write elsewhere, and start "
                "the same command again"
            ) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half-written of `name` in `folder`; only for who holds its lock.

    A folder that had stepped aside when its successor's writer was killed comes back.
    """
    for path in folder.glob(f".{name}.*.old.tmp"):
        before = folder / path.name[1:].rsplit(".", 3)[0]
        if not before.exists():
            os.replace(path, before)
    for pattern in (f".{name}.*.tmp", f"..{name}.holder.json.*.tmp"):
        for path in folder.glob(pattern):
            _remove(path)


@contextmanager
def locked(path: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from writing to `path`, a file or a folder, while the block runs.

    The lock lies beside it (``.NAME.lock``) and ends with the process, however that ends; its holder is told in
    ``.NAME.holder.json``. What a killed process left half-written of `path` is removed.

    Args:
        path: What is written.
        wait: For the other process to end, instead of raising.

    Raises:
        Busy: Another process holds it: says which, and since when.
        CannotWrite: No lock can be made there.
    """
    path = Path(path)
    lock, holder = (path.with_name(f".{path.name}.{kind}") for kind in ("lock", "holder.json"))
    guard = FileLock(lock, timeout=-1 if wait else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire()
    except Timeout as error:
        about = _holder(holder)
        raise Busy(f"{path} is being written by another process{about}; wait for it, or name another place") from error
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}; write elsewhere") from error
    try:
        remove_unfinished(path.parent, glob.escape(path.name))
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:4]])
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": started, "command": command})
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


def _holder(path: Path) -> str:
    try:
        about = read_json(path)
        return f" ({about['command']}; process {about['pid']} on {about['host']}, since {about['since']})"
    except (ValueError, KeyError, OSError):  # it is just beginning or ending
        return ""


def read_json(path: str | os.PathLike) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: It is none: names the file.
        OSError: There is no such file, or it cannot be read.
    """
    text = Path(path).read_bytes()
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or damaged ({error}); fetch or write it again") from error


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """Contents of a file with one JSON value a line."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Whole or not at all; what is not a number becomes null, since JSON has no NaN."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(_plain(content), indent=1, allow_nan=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
