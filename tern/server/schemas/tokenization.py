"""The requests of POST /tokenize and /detokenize, in vLLM's forms."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import FailFast, Field

from tern.errors import InvalidRequestError
from tern.server.schemas.fields import Schema
from tern.server.schemas.sampling import FLAG, IDS, NAME


class TokenizeRequest(Schema):
    """Either `prompt`, plain text, or `messages` with what belongs to a chat."""

    model: str | None = Field(None, description=NAME)
    prompt: str | None = Field(None, description=NAME)
    messages: list[Any] | None = Field(None, description="a list of messages")
    tools: list[Any] | None = Field(None, description="a list of tools")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    add_special_tokens: bool = Field(False, description=FLAG)
    return_token_strs: bool = Field(False, description=FLAG)

    def check(self) -> None:
        """Refuse both forms at once, and neither."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Give either prompt (text) or messages (a chat).", param="prompt")
        if self.prompt is not None and self.tools is not None:
            raise InvalidRequestError("tools belong to messages, not to a prompt: leave them out.", param="tools")
        if self.prompt is None and self.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens belongs to prompt, a template writes its own: leave it out.",
                param="add_special_tokens",
            )


class DetokenizeRequest(Schema):
    """Token ids to turn into text."""

    model: str | None = Field(None, description=NAME)
    tokens: Annotated[list[int], FailFast()] = Field(description=IDS)
