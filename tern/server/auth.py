"""Who may ask: the API key of a request, compared in constant time, and the file that keys are kept in."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Sequence
from pathlib import Path

from fastapi import Request

from tern.errors import OptionError
from tern.server.errors import AuthenticationError

logger = logging.getLogger("tern.server")

MAX_KEY_FILE_BYTES = 1_000_000


def owner_of(request: Request, api_keys: Sequence[str]) -> str | None:
    """The API key that a request came with; None where the server asks for none.

    Clients of OpenAI send `Authorization: Bearer KEY`, those of Anthropic `x-api-key: KEY`; with both, one must fit.
    Every key is compared, whichever fits, and by digests of one length, so that the time taken tells nothing. Raises
    `AuthenticationError`.
    """
    if not api_keys:
        return None
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = [bearer if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
    offered = [hashlib.sha256(key.strip().encode("latin-1")).digest() for key in given if key]
    if not offered:
        raise AuthenticationError(
            "This server asks for an API key: send the header Authorization: Bearer KEY or x-api-key: KEY."
        )
    digests = [(key, hashlib.sha256(key.encode()).digest()) for key in api_keys]
    fitting = [key for key, digest in digests for one in offered if hmac.compare_digest(digest, one)]
    if not fitting:
        raise AuthenticationError("The API key is wrong: send one that this server was started with.")
    return fitting[0]


def keys_from_file(path: Path) -> tuple[str, ...]:
    """The API keys in a file: one a line; empty lines and those that begin with `#` do not count.

    Raises `OptionError` for a file that cannot be read, holds no key, or may be written by more than its owner: whoever
    can write it can let himself in. One that others may read is used, with a warning: secrets that an orchestrator
    mounts are often such.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise OptionError(f"--api-key-file {path} cannot be read: {error.strerror or error}.") from None
    if len(content) > MAX_KEY_FILE_BYTES:
        raise OptionError(f"--api-key-file {path} has more than {MAX_KEY_FILE_BYTES} bytes: give a file of keys alone.")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OptionError(f"--api-key-file {path} may be written by others (mode {mode:o}): chmod go-w {path}.")
    if mode & stat.S_IROTH:
        logger.warning("--api-key-file %s may be read by others (mode %o): chmod 600 it", path, mode)
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise OptionError(f"--api-key-file {path} is not UTF-8: give one key a line.") from None
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not keys:
        raise OptionError(f"--api-key-file {path} holds no key: write one a line.")
    return keys
