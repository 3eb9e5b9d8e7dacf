"""What each route answers, as the published document says it. The tests hold the routes to it: no member
that is not here, and none of these missing.

A member without a default is always there; one with a default may be left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic


class Reply(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())


# --- errors --------------------------------------------------------------------------------------------


class ErrorDetails(Reply):
    """`param` names the field at fault, `code` is for machines."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    error: ErrorDetails


class AnthropicErrorDetails(Reply):
    type: str
    message: str


class AnthropicError(Reply):
    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str | None = None


# --- completions ---------------------------------------------------------------------------------------


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    """`response_cached`: nothing of the reply was computed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    response_cached: bool | None = None


class PromptLogprob(Reply):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Reply):
    """Also a chunk of a streamed one: `usage` is then in the last, if asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    service_tier: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# --- chat ----------------------------------------------------------------------------------------------


class FunctionCall(Reply):
    name: str | None = None
    arguments: str


class ChatToolCall(Reply):
    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ChatToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ChatToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Token(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Token):
    top_logprobs: list[Token]


class ChatLogprobs(Reply):
    content: list[ChatToken]
    refusal: None


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


# --- responses -----------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], pydantic.Field(max_length=0)]
    logprobs: list[ChatToken]


class OutputMessage(Reply):
    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningText(Reply):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Reply):
    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: Annotated[list[Any], pydantic.Field(max_length=0)]
    content: list[ReasoningText]


class OutputFunctionCall(Reply):
    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokens(Reply):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(Reply):
    reasoning_tokens: int


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseFailure(Reply):
    code: str
    message: str


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"]


class ReasoningEcho(Reply):
    effort: str | None


class TextEcho(Reply):
    format: dict[str, Any]


class Response(Reply):
    """The object of every event that bears one, too."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | OutputReasoning | OutputFunctionCall]
    usage: ResponseUsage | None
    service_tier: str
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningEcho
    safety_identifier: str | None
    store: Literal[False]
    temperature: float
    text: TextEcho
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(pydantic.BaseModel):
    """By its type, as OpenAI's reference has them: created and in_progress, then of each item added, its
    parts' or arguments' deltas, and done; at last completed, incomplete or failed."""

    type: str
    sequence_number: int


# --- messages ------------------------------------------------------------------------------------------


class MessageText(Reply):
    type: Literal["text"]
    text: str


class MessageThinking(Reply):
    type: Literal["thinking"]
    thinking: str
    signature: str


class MessageToolUse(Reply):
    """`input` is {"INVALID_JSON": …} where the model's arguments are not an object."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Reply):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    service_tier: Literal["standard", "batch"]


class AssistantMessage(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageText | MessageThinking | MessageToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(pydantic.BaseModel):
    """By its type, as Anthropic's reference has them."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(Reply):
    input_tokens: int


# --- embeddings, the tokenizer -------------------------------------------------------------------------


class Embedding(Reply):
    """Of length 1; base64 is of little-endian f32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    pooling: Literal["last", "mean"]
    service_tier: str
    usage: EmbeddingUsage


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(Reply):
    prompt: str


class TokenizerInfo(Reply):
    tokenizer_class: str
    vocab_size: int
    max_model_len: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None


# --- the server ----------------------------------------------------------------------------------------


class Status(Reply):
    status: Literal["ok", "ready"]


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    max_model_len: int
    embedding_size: int | None = None
    embedding_pooling: Literal["last", "mean"] | None = None


class Models(Reply):
    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str
    last_id: str


class Histogram(Reply):
    """Upper bounds, None for the last, and cumulative counts; seconds."""

    bounds: list[float | None]
    counts: list[int]
    sum: float


class Latency(Reply):
    ttft: Histogram
    itl: Histogram


class Slot(Reply):
    slot: int
    request: str
    mine: bool
    index: int
    tier: str
    state: str
    prompt: int
    computed: int
    cached: int
    generated: int
    pages: int
    shared: int


class Slots(Reply):
    total: int
    held: list[Slot]


class State(Reply):
    """What the page shows; what depends on the engine is left out while there is none."""

    status: str
    message: str | None
    model: str
    seconds: float
    latency: Latency
    chat: bool | None = None
    context: int | None = None
    slots: Slots | None = None
    pages: dict[str, int] | None = None
    queue: dict[str, int] | None = None
    totals: dict[str, int] | None = None


# --- files and batches ---------------------------------------------------------------------------------


class FileObject(Reply):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    expires_at: int | None = None


class Files(Reply):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Reply):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(Reply):
    code: str | None
    message: str
    param: str | None
    line: int | None


class BatchErrors(Reply):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(Reply):
    total: int
    completed: int
    failed: int


class BatchObject(Reply):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class Batches(Reply):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
