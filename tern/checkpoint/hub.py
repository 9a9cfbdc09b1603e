"""Downloads checkpoints from a Hugging Face hub. Knows the hub's client and what can go wrong with it; reads no files.

Everything that the client can be told by environment holds: `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_CACHE`, `HF_TOKEN`,
`HF_HUB_OFFLINE`. A transfer that breaks off is resumed where it stopped, for as long as the process lives and bytes
keep coming; after that, files that were complete are kept and the next run begins with the one that was not.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from tern.errors import HubError

# What running a checkpoint takes: weights, descriptions, template, tokenizer. Never code, never pickles.
ALLOWED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# What says which network a model is, and nothing that is large.
DESCRIPTION_FILES = ["config.json", "generation_config.json"]
# Copies in other formats and training states, which some repositories keep in folders.
IGNORED_FILES = ["*/*"]

# The root of what the client's HTTP library raises, whichever library that is.
_TRANSPORT_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


class _NoProgress(hub_tqdm):
    """The client's progress bar, kept quiet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def download_snapshot(
    repo_id: str, *, revision: str | None, token: str | None, progress: bool, weights: bool = True
) -> Path:
    """Bring the files of a model into the client's cache, unless they are there, and return their directory.

    Without `weights` only `DESCRIPTION_FILES`.
    `revision` is a branch, tag or commit (None: `main`); `token` None takes the stored one or `HF_TOKEN`. A bar
    is shown if `progress` and stderr is a terminal. Without network, files that an earlier run downloaded are used.

    Raises `HubError` that says what could not be done and the way out.
    """
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=ALLOWED_FILES if weights else DESCRIPTION_FILES,
                ignore_patterns=IGNORED_FILES,
                tqdm_class=hub_tqdm if progress and sys.stderr.isatty() else _NoProgress,
            )
        )
    except (OSError, _TRANSPORT_ERROR, ValueError, RuntimeError) as error:
        raise HubError(_explain(error, repo_id, revision)) from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    """One sentence for what went wrong, the most specific kind first."""
    which = f"{repo_id} at {revision}" if revision else repo_id
    hub = constants.ENDPOINT
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no hub id: it must be OWNER/NAME in letters, digits, '-', '_' and '.'."
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then give a token of that account "
            "(HF_TOKEN, `hf auth login` or --token)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: give a branch, tag or commit of {hub}/{repo_id}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} has no model {repo_id}, or it is private: check the spelling, or give a token that may read it "
            "(HF_TOKEN, `hf auth login` or --token)."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return _explain_unreachable(error, which, hub)
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, which, hub)
    return _explain_transfer(error, which, hub)


def _explain_unreachable(error: LocalEntryNotFoundError, which: str, hub: str) -> str:
    partly = "only part of" if isinstance(error, IncompleteSnapshotError) else "none of"
    if constants.is_offline_mode():
        return (
            f"HF_HUB_OFFLINE is set and {partly} {which} is in the cache {constants.HF_HUB_CACHE}: "
            "unset it to download, or give a directory."
        )
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause, which, hub)
    return (
        f"{hub} cannot be reached and {partly} {which} is in the cache {constants.HF_HUB_CACHE}: "
        "check the network and HF_ENDPOINT, or give a directory."
    )


def _explain_status(error: HfHubHTTPError, which: str, hub: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return f"{hub} refused the token for {which} (HTTP {status}): give one that may read it (HF_TOKEN or --token)."
    if status == 429:
        return f"{hub} asks for fewer requests (HTTP 429) while downloading {which}: wait, or give a token."
    return f"{hub} answered HTTP {status} for {which}: try again later."


def _explain_transfer(error: Exception, which: str, hub: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full: {constants.HF_HUB_CACHE} has no room for {which}; "
            "make room, or set HF_HOME to a larger disk, and run again."
        )
    if isinstance(error, PermissionError):
        return f"{error.filename or constants.HF_HUB_CACHE} may not be written: set HF_HOME to a directory of yours."
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return f"Downloading {which} from {hub} broke off ({reason}): run again, complete files are kept."
