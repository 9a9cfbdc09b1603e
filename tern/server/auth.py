"""Who may ask: the API key of a request, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import Request

from tern.server.errors import AuthenticationError


def owner_of(request: Request, api_keys: Sequence[str]) -> str | None:
    """The API key that a request came with; None where the server asks for none.

    Clients of OpenAI send `Authorization: Bearer KEY`, those of Anthropic `x-api-key: KEY`; with both, one must fit.
    Every key is compared, whichever fits, so that the time taken tells nothing. Raises `AuthenticationError`.
    """
    if not api_keys:
        return None
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = [bearer if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", "")]
    offered = [key.strip().encode("latin-1") for key in given if key]
    if not offered:
        raise AuthenticationError(
            "This server asks for an API key: send the header Authorization: Bearer KEY or x-api-key: KEY."
        )
    fitting = [key for key in api_keys for one in offered if hmac.compare_digest(key.encode(), one)]
    if not fitting:
        raise AuthenticationError("The API key is wrong: send one that this server was started with.")
    return fitting[0]
