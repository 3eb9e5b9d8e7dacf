"""A model folder's tokenizer: text to token ids and back, its end tokens, its chat template.

A thin layer over the `tokenizers` library, which reads `tokenizer.json`; the files beside it say which tokens
begin and end a text, and hold the chat template. Knows nothing of models or requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.processors

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.text.pieces import pieces_of
from jaxserve.text.special_text import SpecialText, encoded


class TokenizerError(ValueError):
    """A folder without a usable tokenizer, or text that cannot be encoded."""


class Tokenizer:
    """Thread-safe, except that nothing may be changed after construction.

    backend: the library's tokenizer; truncation and padding are switched off.
    bos_token_id: what a text begins with, if the model has such a token.
    eos_token_ids: what ends a text, best known first.
    pieces: the bytes of each token, or None for an unusual decoder.
    special_ids: tokens that `skip_special_tokens` leaves out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()  # some folders cut texts at 512 tokens without a word
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.pieces = pieces_of(backend)
        added = backend.get_added_tokens_decoder()
        self._special_text = SpecialText(backend)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, and where they exist tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and chat_template.jinja.

        Raises `TokenizerError` naming the file."""
        folder = Path(folder)
        backend = _read_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        tokens = _named_tokens(config, _read_json(folder / "special_tokens_map.json"))
        bos = backend.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None
        if backend.post_processor is None and config.get("add_bos_token") and bos is not None:
            # tokenizer.json says it otherwise; transformers does the same
            name = tokens["bos_token"]
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=[name, "$A"], pair=[name, "$A", "$B"], special_tokens=[(name, bos)]
            )
        return cls(
            backend,
            bos_token_id=bos,
            eos_token_ids=_end_tokens(folder, backend, tokens.get("eos_token")),
            chat_template=_read_chat_template(folder, config, tokens),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included. A model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. The names of special tokens in the text become those tokens, as in transformers.

        add_special_tokens: also what the tokenizer puts around a text, such as BOS.
        Raises `TokenizerError` for text that is not Unicode: a lone surrogate.
        """
        try:
            return encoded(self.backend, text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(f"the text cannot be encoded: {_unicode_fault(text, error)}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids together; ids that have no token add nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, special or not: perhaps part of a character; b"" without a token."""
        if self.pieces is not None:
            return self.pieces[token_id]
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Of the one token that has this text, if there is one."""
        return self.backend.token_to_id(text)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def chat_template_source(self) -> str | None:
        """The template, for clients that render it themselves."""
        return None if self.chat_template is None else self.chat_template.source

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt's text. `tools` and other variables go to the template. Raises `ChatTemplateError`."""
        if self.chat_template is None:
            raise ChatTemplateError("the model has no chat template: use completions")
        tools = variables.pop("tools", None)
        continued = variables.pop("continue_final_message", False)
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continued,
            tools=tools,
            variables=variables,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The prompt's token ids. The template writes BOS itself, so none is added.

        The names of special tokens in what is given are text, unlike in transformers: see `special_text.py`.
        Raises `ChatTemplateError` and `TokenizerError`.
        """
        try:
            messages, variables, found = self._special_text.shield(messages, variables)
        except ValueError as error:
            raise ChatTemplateError(str(error)) from None
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        if found:
            return self._special_text.encode(text)
        return self.encode(text, add_special_tokens=False)


def _unicode_fault(text: object, error: Exception) -> str:
    if not isinstance(text, str):
        return f"{type(text).__name__} is not a string"
    lone = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    return str(error) if lone is None else f"a lone surrogate at character {lone}"


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json; a model folder needs it (Hugging Face layout)")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer: {error}") from error
    except BaseException as error:  # ... and where it panics, something that is not even that
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path} is not a tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON, or not UTF-8
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold an object, not {type(value).__name__}")
    return value


def _named_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, str]:
    """Names such as `eos_token` with their text; tokenizer_config.json wins, also where it says null."""
    tokens: dict[str, str] = {}
    for name, value in {**special_tokens_map, **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _end_tokens(folder: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """From the first file that names any: generation_config.json, config.json, tokenizer_config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(
            isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids
        ):
            raise TokenizerError(
                f"{folder / name}: eos_token_id={value!r} must be a token id or a list of them"
            )
        if ids:
            return tuple(dict.fromkeys(ids))
    token_id = None if eos_token is None else backend.token_to_id(eos_token)
    return () if token_id is None else (token_id,)


def _read_chat_template(folder: Path, config: dict[str, Any], tokens: dict[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, else tokenizer_config.json's: a string, or `default` in a list of named ones."""
    path = folder / "chat_template.jinja"
    source = config.get("chat_template")
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise TokenizerError(f"{path} is not UTF-8: {error}") from error
    else:
        path = folder / "tokenizer_config.json"
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise TokenizerError(f"{path}: chat_template must be a string or a list of named templates")
    try:
        return ChatTemplate(source, variables=tokens)
    except ChatTemplateError as error:
        raise TokenizerError(f"{path}: {error}") from error
