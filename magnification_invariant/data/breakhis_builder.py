"""`BreaKHis` as a builder of `datasets`: a folder or an archive, cached as a table or streamed, in several shards."""

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path, PurePath

import datasets

from magnification_invariant.data.archives import list_images, read_images
from magnification_invariant.data.breakhis import image_paths, nothing_found, raw_features, raw_row, source_kind


@dataclass
class BreaKHisConfig(datasets.BuilderConfig):
    """What a build depends on, and so the key of its cache.

    Attributes:
        source: a folder, an archive, or its URL.
        state: digest of the path, size and time of change of its files, or of what the server says of the URL.
    """

    source: str = ""
    state: str = ""


class BreaKHis(datasets.GeneratorBasedBuilder):
    """Raw rows (`breakhis.raw_features`) of BreaKHis, which `load_breakhis` makes the table of.

    ``BreaKHis(source=...).download_and_prepare(num_proc=...)``, then ``as_dataset(split="train")``; or
    ``as_streaming_dataset(split="train")``. A build is kept until the files or this code change. A shard is a slide;
    an archive that is streamed is one shard, as far as it cannot be entered in the middle.
    """

    BUILDER_CONFIG_CLASS = BreaKHisConfig

    def __init__(self, source: str | os.PathLike, *, hash: str | None = None, **kwargs):
        source = str(source)
        if source_kind(source) != "url":
            source = os.path.abspath(source)
        super().__init__(hash=hash or _code_digest(), source=source, state=_state(source), **kwargs)

    def _info(self):
        return datasets.DatasetInfo(
            features=raw_features(),
            homepage="https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/",
            citation="doi:10.1109/TBME.2015.2496264",
        )

    def _split_generators(self, dl_manager):
        source = self.config.source
        # Not os.path.isdir: `datasets` replaces such functions in a builder's module by ones that take URLs.
        if source_kind(source) == "folder":
            archive, paths = None, image_paths(source)
        elif dl_manager.is_streaming:
            archive, paths = source, None
        else:
            if source_kind(source) == "url" and "ETag" not in _server_says(source):
                dl_manager.download_config.force_download = True  # it would take an older download for this one
            archive = dl_manager.download(source)
            paths = sorted(set(list_images(archive)), key=lambda path: (PurePath(path).name, path))
        if paths is not None and not paths:
            raise nothing_found(source)
        slides = [list(group) for _, group in groupby(paths, _slide)] if paths else [None]
        return [datasets.SplitGenerator("train", gen_kwargs={"archive": archive, "slides": slides})]

    def _generate_examples(self, archive: str | None, slides: list[list[str] | None]):
        paths = None if None in slides else [path for slide in slides for path in slide]
        if archive is None:
            images = ((path, None) for path in paths)
        else:
            images = read_images(archive, paths if paths is None else set(paths))
        for i, (path, content) in enumerate(images):
            yield i, raw_row(path, content)


def _slide(path: str) -> str:
    return PurePath(path).name.rsplit("-", 2)[0]


def _state(source: str) -> str:
    if source_kind(source) == "url":
        files = sorted(_server_says(source).items())
    else:
        paths = image_paths(source) if source_kind(source) == "folder" else [source]
        files = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _server_says(url: str) -> dict:
    """What tells one state of a URL from another."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    telling = ("size", "ETag", "Content-MD5", "Digest", "Last-Modified")
    return {name: value for name, value in filesystem.info(path).items() if name in telling}


@cache
def _code_digest() -> str:
    """Changes with the code that makes rows, so that rows of an older one are not taken for its own."""
    code = [Path(__file__).with_name(name).read_bytes() for name in ("breakhis.py", "archives.py", "images.py")]
    return hashlib.sha256(b"".join([*code, Path(__file__).read_bytes()])).hexdigest()
