"""Tokenizers read from folders: equal to transformers, and clear about what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from tests.text.backends import EMBEDDED, byte_level_backend, id_of, sentencepiece_backend

TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "bos_token": "<|bos|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    "chat_template": TEMPLATE,
}
MESSAGES = [{"role": "user", "content": "add two numbers é"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", CONFIG)
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_equal_to_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("hello world", "", "  é 🎉\n", "a<|user|>b<|end|>", "<|a b|> <naïve>"):
        for add in (True, False):
            ids = theirs(text, add_special_tokens=add).input_ids
            assert ours.encode(text, add_special_tokens=add) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    for add in (True, False):
        theirs_ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=add)["input_ids"]
        assert ours.apply_chat_template(MESSAGES, add_generation_prompt=add) == theirs_ids
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.vocab_size == len(theirs)


def test_the_embedded_model() -> None:
    if not (EMBEDDED / "tokenizer.json").is_file():
        pytest.skip("no embedded model")
    from transformers import PreTrainedTokenizerFast

    ours, theirs = Tokenizer.from_folder(EMBEDDED), PreTrainedTokenizerFast.from_pretrained(EMBEDDED)
    text = Path(json.__file__).read_text(encoding="utf-8")[:3000]
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == text
    messages = [{"role": "user", "content": "write the function that adds two numbers"}]
    assert ours.has_chat_template
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.apply_chat_template(messages) == expected
    assert ours.eos_token_ids and ours.bos_token_id is not None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),  # tokenizer_config.json's eos_token
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": None}}, (1,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [9, 8, 9]}}, (9, 8)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"do_sample": True}}, (7,)),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|user|>"}}, None),
        ({"tokenizer_config.json": {"eos_token": "<not there>"}}, ()),
        ({"tokenizer_config.json": {}}, ()),
    ],
)
def test_end_tokens(folder: Path, files: dict[str, Any], expected: tuple[int, ...] | None) -> None:
    for name, value in files.items():
        write(folder, name, value)
    tokenizer = Tokenizer.from_folder(folder)
    user = id_of(tokenizer.backend, "<|user|>")
    assert tokenizer.eos_token_ids == ((user,) if expected is None else expected)


def test_bos(folder: Path) -> None:
    assert Tokenizer.from_folder(folder).bos_token_id == 0
    write(folder, "special_tokens_map.json", {"bos_token": "<|bos|>"})
    write(folder, "tokenizer_config.json", {"bos_token": None})  # as Qwen says that it has none
    assert Tokenizer.from_folder(folder).bos_token_id is None


def test_bos_where_only_the_config_asks_for_it(tmp_path: Path) -> None:
    value = json.loads(sentencepiece_backend().to_str())
    write(tmp_path, "tokenizer.json", value | {"post_processor": None})
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("the")[0] == 1 and tokenizer.encode("the", add_special_tokens=False)[0] != 1


def test_truncation_and_padding_are_switched_off(folder: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    ids = Tokenizer.from_folder(folder).encode("one two three four five six seven")
    assert len(ids) > 8 and Tokenizer.from_folder(folder).decode(ids) == "one two three four five six seven"


def test_where_the_chat_template_comes_from(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    for template, expected in ((named, "default"), (named[:1], None), (None, None), ("plain", "plain")):
        write(folder, "tokenizer_config.json", CONFIG | {"chat_template": template})
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.has_chat_template == (expected is not None)
        if expected is not None:
            assert tokenizer.render_chat(MESSAGES) == expected
    write(folder, "chat_template.jinja", "file {{ eos_token }} {{ colour }} {{ tools }}")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(MESSAGES, colour="red", tools=[]) == "file <|end|> red []"


def test_a_model_without_a_chat_template(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {})
    with pytest.raises(ChatTemplateError, match="the model has no chat template: use completions"):
        Tokenizer.from_folder(folder).apply_chat_template(MESSAGES)


def test_bytes_and_text_of_single_tokens(byte_level: Tokenizer, llama2: Tokenizer) -> None:
    for tokenizer in (byte_level, llama2):
        text = " naïve 你好 the 🎉"
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" ") == text.removeprefix(" ") or joined == " " + text
        assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_text(10**6) == ""
    assert byte_level.token_text(1) == "<|end|>" and byte_level.token_bytes(1) == b"<|end|>"
    assert llama2.token_text(id_of(llama2.backend, "▁the")) == " the"
    assert llama2.token_bytes(id_of(llama2.backend, "<0xE4>")) == b"\xe4"
    assert llama2.token_text(id_of(llama2.backend, "<0xE4>")) == "\ufffd"


def test_text_that_is_not_unicode(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="a lone surrogate at character 2"):
        byte_level.encode("ab\ud800c")
    with pytest.raises(TokenizerError, match="int is not a string"):
        byte_level.encode(5)  # type: ignore[arg-type]
    assert byte_level.decode(byte_level.encode("nul \x00 \uffff")) == "nul \x00 \uffff"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; a model folder needs it") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "", "is not a tokenizer"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}', "is not a tokenizer"),
        ("tokenizer.json", "[" * 100_000, "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "must hold an object, not list"),
        (
            "tokenizer_config.json",
            '{"chat_template": 5}',
            "chat_template must be a string or a list of named",
        ),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "the chat template is wrong in line 1"),
        ("chat_template.jinja", "{{ ", "the chat template is wrong in line 1"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id='2' must be a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [2, -1]}', "eos_token_id=[2, -1] must be a token id"),
        ("config.json", '{"eos_token_id": true}', "eos_token_id=True must be a token id or a list"),
        ("config.json", "\x00", "is not JSON"),
    ],
)
def test_corrupt_folders(folder: Path, name: str, content: str, words: str) -> None:
    write(folder, name, content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    assert words in str(caught.value) and str(folder / name) in str(caught.value)


def test_files_that_are_not_utf8(folder: Path) -> None:
    for name in ("chat_template.jinja", "config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xff\xfe{}")
        with pytest.raises(TokenizerError, match=name):
            Tokenizer.from_folder(folder)
        (folder / name).unlink()
        byte_level_backend().save(str(folder / "tokenizer.json"))
