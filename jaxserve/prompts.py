"""From a user's words to the scheduler's, for the server, the command line and `LLM` alike: a prompt becomes
token ids, a service tier a class of traffic.

Everything that is wrong is a `RequestError` that names the field. Knows nothing of HTTP, and nothing of
lengths, which `check_request` checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.protocols import TokenizerLike
from jaxserve.scheduler.types import RequestError, Tier

CHARACTERS = 8  # a token has fewer of them on average, in most texts
TIERS = {"auto": Tier.ONLINE, "default": Tier.ONLINE, "flex": Tier.BATCH}


def tier_of(service_tier: str) -> Tier:
    """The class of traffic that OpenAI's word stands for."""
    if service_tier not in TIERS:
        raise RequestError(
            f"service_tier={service_tier!r} must be one of {', '.join(TIERS)}", param="service_tier"
        )
    return TIERS[service_tier]


def encode_text(
    tokenizer: TokenizerLike | None,
    text: str,
    *,
    add_special_tokens: bool = True,
    param: str = "prompt",
    context: int | None = None,
) -> list[int]:
    """The token ids of `text`, which may not be empty. context: see `check_length`."""
    if tokenizer is None:
        raise RequestError(f"this model has no tokenizer: {param} must be token ids", param=param)
    if not text:
        raise RequestError("the prompt is empty: it must hold at least one token", param=param)
    if context is not None:
        check_length(tokenizer, text, context, param=param)
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except ValueError as error:  # a lone surrogate, say
        raise RequestError(f"{param} cannot be tokenized: {error}", param=param) from error


def check_length(tokenizer: TokenizerLike, text: str, context: int, *, param: str) -> None:
    """Raises RequestError for a text that is far longer than a context of so many tokens, by its beginning:
    the tokens of fifteen megabytes take gigabytes, and seconds."""
    head = CHARACTERS * context
    if len(text) <= head:
        return
    try:
        tokens = len(tokenizer.encode(text[:head], add_special_tokens=False))
    except ValueError as error:
        raise RequestError(f"{param} cannot be tokenized: {error}", param=param) from error
    if tokens > context + context // 8:  # a cut in the middle of a word is worth a few tokens
        raise RequestError(
            f"{param}: the first {head} of its {len(text)} characters have {tokens} tokens; the context"
            f" is {context} tokens",
            param=param,
            code="context_length_exceeded",
        )


def encode_chat(
    tokenizer: TokenizerLike | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    param: str = "messages",
    add_generation_prompt: bool = True,
    context: int | None = None,
    **variables: Any,
) -> list[int]:
    """The token ids of a conversation, ending where the assistant's turn begins.

    variables: the template's, such as `tools`. context: see `check_length`.
    """
    if tokenizer is None:
        raise RequestError("this model has no tokenizer, so it cannot chat", param=param)
    if not tokenizer.has_chat_template:
        raise RequestError("this model has no chat template: use completions instead", param=param)
    if not messages:
        raise RequestError("messages is empty: it must hold at least one message", param=param)
    if context is not None:
        contents = [content for message in messages if isinstance(content := message.get("content"), str)]
        check_length(tokenizer, "\n".join(contents), context, param=param)
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is a program that came with the model: any exception can leave it
        raise RequestError(f"the chat template refuses these messages: {error}", param=param) from error


def token_text(tokenizer: TokenizerLike | None, token_id: int) -> str:
    """What one token is called in a list of log-probabilities; vLLM's form where there is no tokenizer."""
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)
