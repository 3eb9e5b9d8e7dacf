"""Small tokenizers of each family, made here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

EMBEDDED = Path(__file__).parents[2] / "checkpoints" / "embedded" / "model"

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "Grüße aus Köln, naïve café, 你好世界, привет мир",
    "emoji 🎉🎉 👩‍👩‍👧 and tabs\t\tand  two  spaces",
]


def byte_level_backend() -> Backend:
    """As GPT-2, Llama 3 and Qwen: every byte has a token; `<|a b|>` is an added token with a space in it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|user|>", "<|assistant|>"])
    backend.add_tokens([AddedToken("<|a b|>", normalized=False), AddedToken("<naïve>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return backend


def sentencepiece_backend(*, strip: bool = True) -> Backend:
    """As Llama 2 and Mistral: U+2581 for a space, bytes as `<0xE4>`; with `strip`, a space at the start."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = []
    for character in "▁abcdefghijklmnopqrstuvwxyz.,é你":
        vocab[character] = len(vocab)
    for left, right in [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "▁"),
        ("a", "n"),
        ("an", "d"),
        ("▁", "and"),
    ]:
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prepend = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace_backend(scheme: str = "always") -> Backend:
    """As T5: a unigram model with the Metaspace decoder and no bytes."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def wordpiece_backend() -> Backend:
    """As BERT: a decoder that looks at neighbours, which has no `Pieces`."""
    names = ["[UNK]", "[SEP]", "the", "qu", "##ick", "fox", "##es", ".", ",", "a", "##a", "é", "##é"]
    backend = Backend(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return backend


def _embedded() -> Backend:
    if not (EMBEDDED / "tokenizer.json").is_file():
        pytest.skip("no embedded model")
    return Backend.from_file(str(EMBEDDED / "tokenizer.json"))


def id_of(backend: Backend, name: str) -> int:
    """The id of a token that is there."""
    found = backend.token_to_id(name)
    assert found is not None, name
    return found


BACKENDS = {
    "byte_level": byte_level_backend,
    "llama2": sentencepiece_backend,
    "gemma": lambda: sentencepiece_backend(strip=False),
    "metaspace": metaspace_backend,
    "metaspace_first": lambda: metaspace_backend("first"),
    "metaspace_never": lambda: metaspace_backend("never"),
    "wordpiece": wordpiece_backend,
    "embedded": _embedded,
}
