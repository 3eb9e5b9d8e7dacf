"""Tokens one at a time give the text of all tokens at once, for every family and for random tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer
from tests.text.backends import id_of

TEXTS = [
    "the quick brown fox",
    "  two spaces, and the end ",
    "naïve café 你好 🎉🎉 👩‍👩‍👧 привет",
    "def add(a, b):\n\treturn a\n",
    "\n\n\n",
    "é",
]


def stream(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, *, skip: bool = True
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def has_broken_byte_run(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> bool:
    """Whether a run of byte tokens holds both characters and an invalid byte: the documented exception."""
    runs, run = [], b""
    for token_id in ids:
        if skip and token_id in tokenizer.special_ids:
            continue
        name = tokenizer.backend.id_to_token(token_id) or ""
        if name.startswith("<0x"):
            run += bytes([int(name[3:5], 16)])
        elif name:
            runs.append(run)
            run = b""
    runs.append(run)
    for each in runs:
        text = each.decode("utf-8", "replace")
        if "\ufffd" in text and text.strip("\ufffd"):
            return True
    return False


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens(tokenizer: Tokenizer, skip: bool) -> None:
    broken = 0
    for seed in range(1500):
        rng = random.Random(seed)
        size = tokenizer.vocab_size
        # low ids are special tokens and single bytes; ids beyond the vocabulary: models pad theirs
        low, high = range(min(size, 262)), range(max(0, size - 60), size + 5)
        share = rng.choice([0.1, 0.3, 1.0])
        ids = [rng.choice(low if rng.random() < share else high) for _ in range(rng.randint(0, 25))]
        text = "".join(stream(tokenizer, ids, skip=skip))
        byte_tokens = tokenizer.pieces is not None and tokenizer.pieces.errors != "replace"
        if byte_tokens and has_broken_byte_run(tokenizer, ids, skip=skip):
            broken += 1
            continue
        assert text == tokenizer.decode(ids, skip_special_tokens=skip), ids
    assert broken < 1000


def test_texts_with_and_without_a_prompt(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        assert "".join(stream(tokenizer, ids)) == whole
        for cut in range(len(ids) + 1):
            prompt, rest = ids[:cut], ids[cut:]
            before = tokenizer.decode(prompt)
            if "\ufffd" not in before:  # the prompt ends with a character
                assert whole == before + "".join(stream(tokenizer, rest, prompt)), (text, cut)


def test_characters_cut_at_random(byte_level: Tokenizer, llama2: Tokenizer) -> None:
    """Bytes of characters from all of Unicode, one token each, complete, truncated and mixed up."""
    for tokenizer in (byte_level, llama2):
        byte_tokens = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
        for seed in range(1000):
            rng = random.Random(seed)
            characters = [
                chr(
                    rng.choice(
                        [rng.randrange(32, 127), rng.randrange(0xA0, 0xD800), rng.randrange(0x10000, 0x11000)]
                    )
                )
                for _ in range(rng.randint(1, 6))
            ]
            data = bytearray("".join(characters).encode())
            if tokenizer is byte_level:
                for _ in range(rng.choice([0, 0, 1, 3])):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            ids = [byte_tokens[bytes([byte])] for byte in data]
            if rng.random() < 0.5:  # between whole characters, a token that is a word
                ends = [i + 1 for i in range(len(data)) if i + 1 == len(data) or data[i + 1] & 0xC0 != 0x80]
                ids.insert(rng.choice(ends), tokenizer.encode(" the")[-1])
                data = bytearray(tokenizer.decode(ids).encode())
            text = "".join(stream(tokenizer, ids))
            assert text == tokenizer.decode(ids)
            if tokenizer is byte_level:
                assert text == data.decode("utf-8", "replace")


def test_a_character_appears_with_its_last_byte(byte_level: Tokenizer, llama2: Tokenizer) -> None:
    for tokenizer, first in ((byte_level, ""), (llama2, "")):
        byte_tokens = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
        ids = [byte_tokens[bytes([byte])] for byte in "🎉\n你".encode()]
        assert stream(tokenizer, ids) == [first, "", "", "🎉", "\n", "", "", "你", ""]
        assert stream(tokenizer, ids[:2])[-1] == tokenizer.decode(ids[:2])
        # a prompt that ends within a character: the reply completes it
        assert stream(tokenizer, ids[2:], ids[:2]) == ["", "🎉", "\n", "", "", "你", ""]


def test_the_first_space_depends_on_the_prompt(llama2: Tokenizer) -> None:
    the = llama2.encode("the", add_special_tokens=False)
    assert llama2.backend.id_to_token(the[0]) == "▁the"
    assert "".join(stream(llama2, the)) == "the"
    assert "".join(stream(llama2, the, [1])) == "the"  # BOS is no text
    assert "".join(stream(llama2, the, [1, *the])) == " the"
    assert "".join(stream(llama2, the, [1, *the, 2, 1])) == " the"
    assert "".join(stream(llama2, [1, *the, *the], skip=False)) == "<s> the the"


def test_a_broken_run_of_byte_tokens_keeps_what_came_out(llama2: Tokenizer) -> None:
    byte = {i: id_of(llama2.backend, f"<0x{i:02X}>") for i in range(256)}
    ids = [*(byte[i] for i in "é".encode()), byte[0xFF]]
    assert stream(llama2, ids) == ["", "é", "\ufffd", ""]
    assert llama2.decode(ids) == "\ufffd\ufffd\ufffd"


def test_invalid_tokens_do_not_wait_for_ever(byte_level: Tokenizer, llama2: Tokenizer) -> None:
    """However invalid the stream, text comes out, and at once."""
    for tokenizer in (byte_level, llama2):
        continuation = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80"]
        assert stream(tokenizer, continuation * 50) == ["\ufffd"] * 50 + [""]


def test_a_decoder_without_pieces_does_not_wait_for_ever() -> None:
    """One that writes U+FFFD itself, as here a word does."""
    backend = Backend(models.WordPiece({"[UNK]": 0, "a\ufffd": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = Tokenizer(backend)
    assert tokenizer.pieces is None
    increments = stream(tokenizer, [1] * 30)
    assert "".join(increments) == tokenizer.decode([1] * 30)
    assert increments[7] != ""


def test_special_tokens_can_be_kept(byte_level: Tokenizer) -> None:
    end = id_of(byte_level.backend, "<|end|>")
    assert stream(byte_level, [end], skip=False) == ["<|end|>", ""]
    assert stream(byte_level, [end]) == ["", ""]
