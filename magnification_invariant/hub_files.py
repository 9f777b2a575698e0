"""Files of a Hub repository or of a folder, by one rule: the only code that talks to `huggingface_hub`."""

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
