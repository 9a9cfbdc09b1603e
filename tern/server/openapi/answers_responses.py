"""The forms of what /v1/responses answers, whole and as events. Knows OpenAI's items; knows no other family."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from tern.server.openapi.answers import Answer, TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class ReasoningText(Answer):
    """A thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputText(Answer):
    """A text, with its log-probabilities if the request asks for them."""

    type: Literal["output_text"]
    text: str
    annotations: list[None] = Field(description="Empty.")
    logprobs: list[TokenLogprob]


class ReasoningItem(Answer):
    """A thought of the model's."""

    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[None] = Field(description="Empty.")
    content: list[ReasoningText] = Field(description="One part; none while it begins.")


class MessageItem(Answer):
    """What the model says."""

    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText] = Field(description="One part; none while it begins.")


class FunctionCallItem(Answer):
    """A call of a tool."""

    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str = Field(description="What the call's output must name.")
    name: str
    arguments: str = Field(description="JSON text.")


Item = Annotated[ReasoningItem | MessageItem | FunctionCallItem, Field(discriminator="type")]
Part = Annotated[ReasoningText | OutputText, Field(discriminator="type")]


class InputTokensDetails(Answer):
    """Of the tokens read."""

    cached_tokens: int = Field(description="Found in the prefix cache.")
    cache_write_tokens: int = Field(description="Always 0.")


class OutputTokensDetails(Answer):
    """Of the tokens generated."""

    reasoning_tokens: int = Field(description="Inside thoughts.")


class ResponseUsage(Answer):
    """How many tokens a response took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Answer):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(Answer):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(Answer):
    """The request's effort."""

    effort: str | None
    summary: None


class ResponseText(Answer):
    """The request's format of the text."""

    format: dict[str, Any]


class ResponseAnswer(Answer):
    """The answer of a conversation in items, and what it repeats of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    store: Literal[False]
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None = Field(description="Null before the end.")


class Event(Answer):
    """Base of every event; they are numbered from 0."""

    sequence_number: int


class ResponseStatusEvent(Event):
    """The response as it stands: it begins, or has ended."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseAnswer


class ItemEvent(Event):
    """An item begins, or has ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class PlacedEvent(Event):
    """Base of the events about an item."""

    item_id: str
    output_index: int


class ContentEvent(PlacedEvent):
    """Base of the events about a part of an item."""

    content_index: Literal[0]


class PartEvent(ContentEvent):
    """A part of an item begins, or has ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: Part


class ReasoningTextDelta(ContentEvent):
    """A piece of a thought."""

    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningTextDone(ContentEvent):
    """All of a thought."""

    type: Literal["response.reasoning_text.done"]
    text: str


class OutputTextDelta(ContentEvent):
    """A piece of a text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(ContentEvent):
    """All of a text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(PlacedEvent):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(PlacedEvent):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(Event):
    """What went wrong; the response comes after it, as far as it came."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


class ResponseEvent(
    RootModel[
        Annotated[
            ResponseStatusEvent
            | ItemEvent
            | PartEvent
            | ReasoningTextDelta
            | ReasoningTextDone
            | OutputTextDelta
            | OutputTextDone
            | ArgumentsDelta
            | ArgumentsDone
            | ErrorEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a streamed response, named by its type."""
