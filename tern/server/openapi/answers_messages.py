"""The forms of what /v1/messages answers, whole, as events and in error. Knows Anthropic's blocks and events alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from tern.server.openapi.answers import Answer


class MessageErrorDetail(Answer):
    """What went wrong."""

    type: str = Field(description="The class of error.")
    message: str = Field(description="One sentence with the value, the limit and the way out.")


class MessageError(Answer):
    """Anthropic's envelope of an error; in a stream it is the last event."""

    type: Literal["error"]
    error: MessageErrorDetail


class ThinkingBlock(Answer):
    """The thought, if the request asks for one."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field(description="A constant.")


class TextBlock(Answer):
    """What the model says."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Answer):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Block = Annotated[ThinkingBlock | TextBlock | ToolUseBlock, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ThinkingTokens(Answer):
    """Of the tokens generated."""

    thinking_tokens: int = Field(description="Inside the thought, shown or not.")


class MessageUsage(Answer):
    """How many tokens a message took; what came from the prefix cache is counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int = Field(description="Always 0.")
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | None = None


class Message(Answer):
    """The answer of a conversation in blocks."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None = Field(description="Null while the message begins.")
    stop_sequence: str | None = Field(description="The text of stop_sequences that ended it, if one did.")
    usage: MessageUsage


class CountedTokens(Answer):
    """How many tokens the engine would read."""

    input_tokens: int


class MessageStart(Answer):
    """The message begins."""

    type: Literal["message_start"]
    message: Message


class BlockStart(Answer):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: Block


class ThinkingDelta(Answer):
    """A piece of the thought."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(Answer):
    """The thought's signature."""

    type: Literal["signature_delta"]
    signature: str


class TextDelta(Answer):
    """A piece of a text."""

    type: Literal["text_delta"]
    text: str


class InputJsonDelta(Answer):
    """A piece of a call's arguments."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Answer):
    """What is added to a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[ThinkingDelta | SignatureDelta | TextDelta | InputJsonDelta, Field(discriminator="type")]


class BlockStop(Answer):
    """A block has ended."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnd(Answer):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Answer):
    """What is known of the message at its end."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Answer):
    """The message has ended."""

    type: Literal["message_stop"]


class Ping(Answer):
    """Sent when nothing has been for a while."""

    type: Literal["ping"]


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | MessageError,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a streamed message, named by its type."""
