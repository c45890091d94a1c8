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

CACHED = "models--"  # how a repository's folder in the cache begins
REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")


class NotFound(ValueError):
    """No folder and no repository is meant by this name, or the repository cannot be had."""


def locate(checkpoint: str | os.PathLike[str], patterns: Sequence[str] | None = None, *, download: bool = True) -> Path:
    """The folder or file that `checkpoint` means.

    A path that exists is taken as it is; so is the folder of a repository in the Hub's cache (`models--owner--name`),
    by its branch `main`. Anything else must be a repository, of which the files that match `patterns` (None: all) are
    downloaded. `download` False looks into the cache alone and takes what is there. Raises NotFound with the way out.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() and (path / "snapshots").is_dir() and path.name.startswith(CACHED):
        return _cached_snapshot(path, None)
    if path.exists():
        return path
    name = os.fspath(checkpoint)
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise NotFound(f"there is no file or folder {name}; pass a path, or a repository of the Hub as owner/name")
    if not download:
        return _cached_snapshot(
            Path(constants.HF_HUB_CACHE, CACHED + match["repo"].replace("/", "--")), match["revision"]
        )
    return _snapshot(match["repo"], match["revision"], patterns)


def _cached_snapshot(cache: Path, revision: str | None) -> Path:
    """The snapshot of a revision (None: of `main`, or the only one) in a repository's folder of the cache."""
    folder = cache / "snapshots"
    snapshots = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    branch = cache / "refs" / (revision or "main")
    wanted = folder / (branch.read_text().strip() if branch.is_file() else revision or "")
    if wanted in snapshots:
        return wanted
    if len(snapshots) == 1 and revision is None:
        return snapshots[0]
    raise NotFound(
        f"there is no folder {cache.name.removeprefix(CACHED).replace('--', '/')} here, and {cache} has "
        f"{len(snapshots)} snapshots, none of {revision or 'the branch main'}; nothing was downloaded"
    )


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    told = f"{repo}@{revision}" if revision else repo
    missing = f"there is no folder {told} here"
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=list(patterns) if patterns else None)
    except LocalEntryNotFoundError as error:
        why = f"{constants.ENDPOINT} could not be reached ({_first_line(error)})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        part = "only a part of" if "incomplete" in str(error) else "no"
        raise NotFound(
            f"{missing}, the Hub's cache ({constants.HF_HUB_CACHE}) has {part} {told}, and {why}; "
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
