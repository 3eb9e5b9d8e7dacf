"""The embedded model's folder as others load it, and the trainer at a tiny size."""

import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from checkpoints.embedded import MODEL_DIR
from checkpoints.embedded import data as data_module
from checkpoints.embedded.data import (
    HELD_OUT,
    Corpus,
    Tokens,
    Windows,
    chat_pairs,
    is_test_of_held_out,
    render_pair,
)
from checkpoints.embedded.evaluate import evaluate, spans
from checkpoints.embedded.model import ModelConfig, initialise, load_model, save_model, token_losses
from checkpoints.embedded.train import TrainConfig, train

TINY = ModelConfig(vocabulary=64, hidden=32, layers=2, mlp=48, heads=2, kv_heads=1, context=32)

DOCUMENTED = '''
class Stack:
    def total(self, items):
        """Return the sum of the items, counted twice.

        More words.
        """
        return 2 * sum(items)

    def unclear(self, items):
        """Whether there are any, that is all."""
        x = 1
        return bool(items)
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    """The held-out files of the running Python that are the ones which were evaluated."""
    import sysconfig

    recorded = json.loads((MODEL_DIR.parent / "evaluation.json").read_text())["files"]
    texts = {path: (Path(sysconfig.get_path("stdlib")) / path).read_text("utf-8") for path in recorded}
    same = {p: t for p, t in texts.items() if hashlib.sha256(t.encode()).hexdigest() == recorded[p]["sha256"]}
    if not same:
        pytest.skip("no held-out module of this Python is the evaluated one's")
    return same


def random_tokens(seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[np.ndarray]:
        return [
            rng.integers(0, TINY.vocabulary, rng.integers(20, 90)).astype(np.uint16) for _ in range(count)
        ]

    return Tokens(library=draw(9), tests=draw(9), pairs=draw(5))


def test_weights_and_tokenizer_stay_under_16_mib():
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 16 * 2**20


def test_transformers_loads_the_folder_and_agrees_on_the_losses(tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert type(peer).__name__ == "LlamaForCausalLM"
    assert 5e6 <= sum(p.numel() for p in peer.parameters()) <= 8e6
    assert peer.config.max_position_embeddings >= 1024
    assert peer.generation_config.eos_token_id == [tokenizer.token_to_id("<|end|>")]
    params, config = load_model(MODEL_DIR)
    ids = np.asarray([tokenizer.encode(Path(__file__).read_text()).ids[:200]])
    ours = np.asarray(token_losses(params, jnp.asarray(ids), config, jnp.float32))[0]
    with torch.no_grad():
        logprobs = peer(torch.tensor(ids)).logits[0, :-1].log_softmax(-1)
    theirs = -logprobs.gather(1, torch.tensor(ids[0, 1:, None]))[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    ["", " ", "def f(x):\n    return x\n", "é ☃ \r\n\t x = '1234567'\n\n\n  y", "a<|end|>b", "\x00\x7f"],
)
def test_auto_tokenizer_gives_the_same_ids(tokenizer, text):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = tokenizer.encode(text).ids
    assert auto(text).input_ids == ids
    assert ids[0] == tokenizer.token_to_id("<|bos|>") and ids.count(ids[0]) == 1
    assert auto.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == f"<|bos|>{text}"


def test_chat_template_renders_alike_in_plain_jinja_and_as_trained(tokenizer):
    messages = [
        {"role": "user", "content": "Write f."},
        {"role": "assistant", "content": "def f():\n    pass"},
    ]
    template = (MODEL_DIR / "chat_template.jinja").read_text()
    assert json.loads((MODEL_DIR / "tokenizer_config.json").read_text())["chat_template"] == template
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    assert plain.render(messages=messages) == render_pair("Write f.", "def f():\n    pass")
    opened = plain.render(messages=messages[:1], add_generation_prompt=True)
    assert opened == "<|bos|><|user|>\nWrite f.<|end|>\n<|assistant|>\n"
    with_system = plain.render(messages=[{"role": "system", "content": "Be brief."}, *messages])
    assert with_system.startswith("<|bos|><|system|>\nBe brief.<|end|>\n<|user|>\n")
    ids = tokenizer.encode(opened, add_special_tokens=False).ids
    assert ids == tokenizer.encode(render_pair("Write f.", "x"), add_special_tokens=False).ids[: len(ids)]
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    assert auto.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == opened


def test_held_out_bits_are_at_most_70_percent_of_xz():
    recorded = json.loads((MODEL_DIR.parent / "evaluation.json").read_text())
    assert recorded["total"]["share_of_xz"] <= 0.70


def test_bits_per_byte_are_as_recorded(tokenizer, held_out):
    recorded = json.loads((MODEL_DIR.parent / "evaluation.json").read_text())
    assert set(recorded["files"]) == {f"{module}.py" for module in HELD_OUT}
    params, config = load_model(MODEL_DIR)
    path = min(held_out, key=lambda path: len(held_out[path]))
    again = evaluate(params, config, tokenizer, {path: held_out[path]})["files"][path]
    assert again["bytes"] == recorded["files"][path]["bytes"]
    assert again["xz_bits_per_byte"] == pytest.approx(recorded["files"][path]["xz_bits_per_byte"], rel=0.01)
    assert again["model_bits_per_byte"] == pytest.approx(
        recorded["files"][path]["model_bits_per_byte"], rel=1e-3
    )


def test_tokenizer_loses_no_byte(tokenizer, held_out):
    for text in held_out.values():
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 48, 49, 1000])
def test_windows_score_every_token_once_with_half_a_context_before_it(length):
    scored = []
    for start, first, end in spans(length, 32):
        assert end - start <= 32
        assert start == 0 or first - start == 16
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_a_restart_ends_with_the_weights_of_an_unbroken_run(tmp_path):
    config = TrainConfig(steps=4, rows=2)
    with jax.numpy_dtype_promotion("standard"):  # optax divides an integer step count by a float
        unbroken = train(Windows(random_tokens(), 32, seed=1), TINY, config, tmp_path / "unbroken")
        train(Windows(random_tokens(), 32, seed=1), TINY, config, tmp_path / "broken", stop_after=2)
        resumed = train(Windows(random_tokens(), 32, seed=1), TINY, config, tmp_path / "broken")
    assert int(resumed["step"]) == 4 and int(resumed["window"]) == 8
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path((unbroken["params"], unbroken["moments"])),
        jax.tree.leaves((resumed["params"], resumed["moments"])),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def test_windows_depend_on_the_position_alone():
    whole = Windows(random_tokens(), 16, seed=3).take(0, 200)  # several rounds
    fresh = Windows(random_tokens(), 16, seed=3)
    for position in (150, 3, 90):
        np.testing.assert_array_equal(fresh.take(position, 4), whole[position : position + 4])


def test_export_round_trip_is_bf16_rounding(tmp_path):
    params = initialise(TINY, seed=0)
    save_model(tmp_path, params, TINY)
    read, config = load_model(tmp_path)
    assert config == TINY
    for name, value in params.items():
        np.testing.assert_array_equal(read[name], value.astype(jnp.bfloat16).astype(jnp.float32))


def test_pairs_come_from_docstrings():
    [(question, answer)] = chat_pairs({"stack.py": DOCUMENTED})
    assert re.fullmatch(r"Write .*that returns the sum of the items, counted twice\.", question)
    assert answer.startswith("def total(self, items):\n    ") and answer.endswith("return 2 * sum(items)")


def test_held_out_modules_and_their_tests_are_in_no_training_text(tmp_path):
    for module in HELD_OUT:
        (tmp_path / f"{module}.py").write_text(f"# {module} " * 20)
    kept = {"os.py": "library", "test/test_os.py": "tests", "asyncio/queues.py": "library"}
    for path in (
        *kept,
        "test/test_heapq.py",
        "test/test_csv/__init__.py",
        "site-packages/x.py",
        "pydoc_data/topics.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path} " * 20)
    corpus: Corpus = data_module.read_corpus(tmp_path)
    assert dict.fromkeys(corpus.library, "library") | dict.fromkeys(corpus.tests, "tests") == kept
    assert set(corpus.held_out) == {f"{module}.py" for module in HELD_OUT}
    assert is_test_of_held_out("test/test_heapq.py") and not is_test_of_held_out("test/test_queue.py")
    (tmp_path / "heapq.py").unlink()
    with pytest.raises(ValueError, match="heapq"):
        data_module.read_corpus(tmp_path)
