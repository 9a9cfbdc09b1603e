"""The forms of answers, for the document alone: routes write their JSON by hand, and tests hold it to these forms.

A field with a default may be absent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Answer(BaseModel):
    """Base of every form: nothing that is not described."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong."""

    message: str = Field(description="One sentence with the value, the limit and the way out.")
    type: str = Field(description="The class of error.")
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="A stable word for programs.")


class ErrorAnswer(Answer):
    """OpenAI's envelope of an error."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """Of the tokens read."""

    cached_tokens: int = Field(description="Found in the prefix cache.")


class CompletionTokensDetails(Answer):
    """Of the tokens generated."""

    reasoning_tokens: int = Field(description="Inside thoughts.")


class Usage(Answer):
    """How many tokens an answer took. While a stream goes on, details are absent."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(Answer):
    """A candidate of one place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A sampled token and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None


class PromptLogprob(Answer):
    """A candidate of one place of the prompt."""

    logprob: float
    rank: int = Field(description="1 is the likeliest token.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(Answer):
    """The function that is called."""

    name: str
    arguments: str = Field(description="JSON text.")


class ToolCall(Answer):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answer):
    """The model's message: thought, answer and calls apart."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = Field(description="The thought.")
    reasoning: str | None = Field(description="The thought again, under its newer name.")
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]
StopReason = str | int | None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = Field(description="The stop text or stop token that ended the choice, if one did.")
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """The answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(Answer):
    """A piece of a call; the first has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """A piece of the call at `index`; the first has the id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    """What a chunk adds to one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """One event of a streamed chat; the last event is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletionEvent(RootModel[ChatCompletionChunk | ErrorAnswer]):
    """One event of a streamed chat; an error is the last before `[DONE]`."""


class LegacyLogprobs(Answer):
    """Lists with one entry a token; the first token of an echoed prompt has no score."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation, or in a stream a piece of it, which has no finish_reason before the last."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: StopReason
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    """The answer of a completion, and each event of a streamed one, of which the last is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionEvent(RootModel[Completion | ErrorAnswer]):
    """One event of a streamed completion; an error is the last before `[DONE]`."""


class ModelPermission(Answer):
    """What may be done with a model, as OpenAI once said it."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: None
    is_blocking: bool


class EngineFacts(Answer):
    """What the engine computes with."""

    dtype: str
    quantization: str | None = Field(description="The packing of the weights, null for floats.")
    kv_cache_dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = Field(description="Tokens of a cache block.")
    num_blocks: int
    prefix_caching: bool


class ModelCard(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int = Field(description="Longest prompt and answer together, in tokens.")
    permission: list[ModelPermission]
    tern: EngineFacts


class ModelList(Answer):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Answer):
    """The token ids of a text or of a rendered chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Answer):
    """The text of token ids."""

    prompt: str


class Health(Answer):
    """Whether the engine's thread shows signs of life."""

    status: Literal["ok", "unhealthy"]
    engine: str
    heartbeat_age: float = Field(description="Seconds since its last sign.")


class Readiness(Answer):
    """Whether new requests are taken."""

    ready: bool
    engine: str


class Version(Answer):
    """Tern's version."""

    version: str
