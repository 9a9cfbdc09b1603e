"""Who may ask: the API key of a request, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import Request

from tern.server.errors import AuthenticationError


def owner_of(request: Request, api_keys: Sequence[str]) -> str | None:
    """The API key that a request came with; None where the server asks for none.

    Every key is compared, whichever fits, so that the time taken tells nothing. Raises `AuthenticationError`.
    """
    if not api_keys:
        return None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise AuthenticationError("This server asks for an API key: send the header Authorization: Bearer KEY.")
    offered = given.strip().encode("latin-1")
    fitting = [key for key in api_keys if hmac.compare_digest(key.encode(), offered)]
    if not fitting:
        raise AuthenticationError("The API key is wrong: send one that this server was started with.")
    return fitting[0]
