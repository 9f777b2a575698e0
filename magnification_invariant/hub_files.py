"""Files of a Hub repository or of a folder, by one rule: the only code that talks to `huggingface_hub`.

Tokens are found by its client (`hf auth login`, ``HF_TOKEN``); nothing here reads, prints or writes one.
"""

import fnmatch
import hashlib
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SAFE_FILES = ("*.json", "*.safetensors", "*.parquet", "*.png", "*.md")
"""What is read from repositories: data. Formats that can run code when they are opened (pickles) are not."""


def resolve(
    repo_or_folder: str, file: str, revision: str | None = None, *, cache_dir: str | os.PathLike | None = None
) -> Path:
    """Local path of `file` in a folder, or in a Hub model repository, downloaded into the Hub cache if needed.

    Args:
        repo_or_folder: a model's folder or that of its run, or a repository id with or without timm's ``hf-hub:``
            before and ``@revision`` behind.
        file: path inside it, one of `SAFE_FILES`.
        revision: branch, tag or commit.
        cache_dir: instead of the Hub's own cache.

    Raises:
        ValueError: the file leads out of the folder, or is of a kind that can run code.
        FileNotFoundError: no such file, folder or repository, or no way to reach it; says which, and what to do.
        OSError: what arrived is not what the Hub's checksum says.
    """
    if not any(fnmatch.fnmatch(file, pattern) for pattern in SAFE_FILES):
        raise ValueError(f"{file} of {repo_or_folder} is not read: only {', '.join(SAFE_FILES)} are")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{file} is not inside {repo_or_folder}")
    folder = _model_in(Path(repo_or_folder).expanduser())
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the folder {folder} holds no {file}")
        return folder / file

    from huggingface_hub import hf_hub_download

    repo, revision = _repo_and_revision(repo_or_folder, revision)
    path = _fetched(repo_or_folder, file, lambda: hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    return _verified(Path(path))


def snapshot(repo_or_folder: str, revision: str | None = None) -> Path:
    """Local folder with all `SAFE_FILES` of a Hub model repository; of a folder, the folder itself.

    Other files may lie there too, which somebody else has downloaded. Arguments and errors as of `resolve`.
    """
    folder = _model_in(Path(repo_or_folder).expanduser())
    if folder.is_dir():
        return folder

    from huggingface_hub import snapshot_download

    repo, revision = _repo_and_revision(repo_or_folder, revision)
    fetch = partial(snapshot_download, repo, revision=revision, allow_patterns=list(SAFE_FILES))
    folder = Path(_fetched(repo_or_folder, "its files", fetch))
    for pattern in SAFE_FILES:
        for path in folder.rglob(pattern):
            _verified(path)
    return folder


def _model_in(folder: Path) -> Path:
    """The model of a run's folder; any other folder itself."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _repo_and_revision(repo: str, revision: str | None) -> tuple[str, str | None]:
    repo, _, at = repo.removeprefix("hf-hub:").partition("@")
    return repo, revision or at or None


def _fetched(repo: str, what: str, fetch: Callable[[], str]) -> str:
    """What `fetch` gives; of a failed download is said what was asked for, where, and the ways on."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from huggingface_hub.utils import httpx

    try:
        return _patiently(fetch)
    except (
        EntryNotFoundError,
        HFValidationError,
        OSError,
        httpx.HTTPError,
    ) as error:  # absent, gated, offline, no space
        place = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
        if (status := _status(error)) in PASSING:
            raise OSError(
                f"the Hub ({place}) answered {status} when asked for {what} of {repo}, {len(PATIENCE) + 1} times: that "
                "is the server's trouble and not this machine's; start the same command again later"
            ) from error
        raise FileNotFoundError(
            f"{repo} is neither a folder nor a Hub repository that gives {what} ({place}): "
            f"{' '.join(str(error).split())} Ways on: publish the model there with `magdg push`; point "
            "MAGDG_HUB_NAMESPACE or HF_ENDPOINT to where it is, with a token if it is private (`hf auth login`); or "
            "load a local folder (`local-dir:FOLDER` in timm)."
        ) from error


PATIENCE = (1.0, 3.0, 9.0)  # seconds between tries of what may pass
PASSING = frozenset({429, 500, 502, 503, 504})  # status codes that say "not now"


def _patiently(call: Callable[[], Any]) -> Any:
    """What `call` gives, tried again with waiting while the Hub says that it cannot answer just now."""
    for pause in PATIENCE:
        try:
            return call()
        except Exception as error:
            if _status(error) not in PASSING:
                raise
            response = getattr(error, "response", None)
            asked = str(getattr(response, "headers", {}).get("retry-after", ""))
            time.sleep(min(float(asked), 60.0) if asked.isdigit() else pause)
    return call()


def _status(error: BaseException | None) -> int | None:
    """The status code of a server's answer that an error, or the one behind it, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _verified(path: Path) -> Path:
    """The file, once its bytes are what the Hub's checksum says, by which the cache names it; else it is removed.

    The Hub's client compares sizes only. (Files that come by Xet are named otherwise, and Xet checks them itself.)
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--"):
        digest = {40: hashlib.sha1(b"blob %d\0" % blob.stat().st_size), 64: hashlib.sha256()}.get(len(blob.name))
        if digest:
            with open(blob, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            if digest.hexdigest() != blob.name:
                blob.unlink()
                path.unlink(missing_ok=True)
                raise OSError(f"{path.name} arrived damaged (its checksum is wrong) and was removed; try again")
    return path


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Commits all files of `folder`, but hidden ones, to a Hub repository, which is made if needed: one commit or none.

    Args:
        folder: what the repository's root shall hold.
        repo: repository id, ``user/name``.
        private: of a repository that is made; by default what the account's settings say.
        revision: branch to commit to, made if needed; ``main`` by default.
        create_pr: open a pull request against ``main`` instead.
        message: first line of the commit.

    Returns:
        URL of the commit or pull request; "" where the repository holds all that already, and nothing was done.

    Raises:
        ValueError: the folder has no file, or the Hub does not accept the card.
        OSError: no token, no right, no way to reach the Hub, or somebody else has committed meanwhile; says which.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import httpx

    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
    if not files:
        raise ValueError(f"there is no file in {folder} to upload to {repo}")
    api = HfApi()

    def commit() -> str:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        before = api.repo_info(name, revision=revision)
        operations = [CommitOperationAdd(file, str(path)) for file, path in files.items()]
        # Not upload_folder: it cuts a large folder into several commits, and a reader would see half of them.
        done = api.create_commit(
            name,
            operations,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or f"Upload {folder.name}",
            parent_commit=before.sha,  # what the decision was made on: refused if that is no longer the head
        )
        return "" if done.oid == before.sha else done.pr_url or done.commit_url

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # predictions
            return _patiently(commit)
    except (OSError, httpx.HTTPError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else ""  # of a file's transfer
        why = " ".join(f"{error} {cause}".split())
        raise OSError(
            f"{folder} could not be uploaded to the repository {repo}: {why} "
            "Nothing was committed by halves; the same command goes on once the cause is gone."
        ) from error
