"""Files of a Hub repository or of a folder, by one rule: the only code that talks to `huggingface_hub`."""

import fnmatch
from pathlib import Path


def resolve(repo_or_folder: str, file: str, revision: str | None = None) -> Path:
    """Local path of `file` in a folder, or in a Hub model repository, downloaded into the Hub cache if needed.

    Args:
        repo_or_folder: a folder, or a repository id with or without timm's ``hf-hub:`` before and ``@revision`` behind.
        file: path inside it.
        revision: branch, tag or commit.

    Raises:
        FileNotFoundError: no such file, folder or repository, or no way to reach it; says which.
    """
    folder = Path(repo_or_folder).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the folder {folder} holds no {file}")
        return folder / file

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    repo, _, at = repo_or_folder.removeprefix("hf-hub:").partition("@")
    try:
        return Path(hf_hub_download(repo, file, revision=revision or at or None))
    except (EntryNotFoundError, HFValidationError, OSError) as error:  # OSErrors: absent, gated, offline
        raise FileNotFoundError(
            f"{repo_or_folder} is neither a folder nor a Hub repository that gives {file}: {error}"
        ) from error


def upload(
    folder: str | Path,
    repo: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    replace: str | None = None,
) -> str:
    """Commits all files of `folder`, but hidden ones, to a Hub repository, which is made if needed: one commit or none.

    Args:
        folder: what the repository's root shall hold.
        repo: repository id, ``user/name``.
        repo_type: "model" or "dataset".
        private: of a repository that is made; by default what the account's settings say.
        revision: branch to commit to, made if needed; ``main`` by default.
        create_pr: open a pull request instead.
        message: first line of the commit.
        replace: a pattern, ``data/*.parquet``; files there that match it and are not in `folder` are deleted in the
            same commit.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: the folder has no file, or the Hub does not accept the card.
        OSError: no token, no right, or no way to reach the Hub; says which.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import httpx

    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
    if not files:
        raise ValueError(f"there is no file in {folder} to upload to {repo}")
    api = HfApi()
    try:
        repo = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if replace:
            there = api.list_repo_files(repo, repo_type=repo_type, revision=revision)
            operations += [CommitOperationDelete(name) for name in fnmatch.filter(there, replace) if name not in files]
        # Not upload_folder: it cuts a large folder into several commits, and a reader would see half of them.
        commit = api.create_commit(
            repo,
            operations,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or f"Upload {folder.name}",
        )
    except (OSError, httpx.HTTPError) as error:
        raise OSError(f"{folder} could not be uploaded to the {repo_type} repository {repo}: {error}") from error
    return commit.pr_url or commit.commit_url
