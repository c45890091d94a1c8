"""From what a user calls a checkpoint to the folder on this machine: a path, or a repository of the Hugging Face Hub.

A repository is `owner/name`, or `owner/name@revision` (a branch, tag or commit). It is taken from the Hub's cache and
downloaded into it where it is not complete; `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE` and `HF_TOKEN`
mean what they mean to `huggingface_hub`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")


class NotFound(ValueError):
    """No folder and no repository is meant by this name, or the repository cannot be had."""


def locate(checkpoint: str | os.PathLike[str], patterns: Sequence[str] | None = None, *, download: bool = True) -> Path:
    """The folder or file that `checkpoint` means.

    A path that exists is taken as it is; so is the folder of a repository in the Hub's cache (`models--owner--name`),
    by its branch `main`. Anything else must be a repository, of which the files that match `patterns` (None: all) are
    downloaded. `download` False looks into the cache alone. Raises NotFound with the way out.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() and (path / "snapshots").is_dir() and path.name.startswith("models--"):
        return _cached_snapshot(path)
    if path.exists():
        return path
    name = os.fspath(checkpoint)
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise NotFound(f"there is no file or folder {name}; pass a path, or a repository of the Hub as owner/name")
    return _snapshot(match["repo"], match["revision"], patterns, download)


def _cached_snapshot(cache: Path) -> Path:
    snapshots = sorted(folder for folder in (cache / "snapshots").iterdir() if folder.is_dir())
    main = cache / "refs" / "main"
    if main.is_file() and (cache / "snapshots" / main.read_text().strip()) in snapshots:
        return cache / "snapshots" / main.read_text().strip()
    if len(snapshots) == 1:
        return snapshots[0]
    raise NotFound(f"{cache} has {len(snapshots)} snapshots and no branch main; pass the folder of one of them")


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str] | None, download: bool) -> Path:
    told = f"{repo}@{revision}" if revision else repo
    missing = f"there is no folder {told} here"
    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns) if patterns else None,
            local_files_only=not download or constants.HF_HUB_OFFLINE,
        )
    except LocalEntryNotFoundError as error:
        why = f"{constants.ENDPOINT} could not be reached ({_first_line(error)})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        elif not download:
            why = "nothing was downloaded"
        raise NotFound(
            f"{missing}, the Hub's cache ({constants.HF_HUB_CACHE}) has no {told}, and {why}; "
            f"run `hf download {repo}` where there is a network and copy the folder, or pass a path"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{missing}, and the repository {repo} has no revision {revision}; see its branches") from error
    except GatedRepoError as error:
        raise NotFound(
            f"{missing}, and the repository {repo} asks for consent: accept its terms on {constants.ENDPOINT}/{repo}, "
            "then `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"{missing}, and {constants.ENDPOINT} has no repository {repo} (or it is private: set HF_TOKEN); "
            "check the spelling"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotFound(f"{missing}, and {told} cannot be downloaded: {_first_line(error)}; try again") from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
