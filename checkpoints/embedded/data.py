"""The embedded model's data: the source of Python's own standard library.

Decides which files are trained on and which are held out, trains the tokenizer, makes question-and-answer
pairs from docstrings and function bodies, and deals the tokens out as shuffled windows. Everything is a pure
function of the running Python's standard library and a seed. It knows nothing of the model or of the
optimizer.

A document is `<|bos|> text <|end|>`; a pair is exactly what the chat template makes of it. Documents are
shuffled, joined, cut into windows and the windows shuffled; attention is not masked between the documents of
a window.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Modules of varied kind that are held out whole, with everything under Lib/test named test_<module>.
HELD_OUT = (
    "bisect", "calendar", "cmd", "colorsys", "configparser", "csv", "difflib", "fnmatch", "fractions",
    "graphlib", "heapq", "netrc", "plistlib", "sched", "shlex", "statistics", "textwrap", "timeit",
    "wave", "zipapp",
)  # fmt: skip

BOS, END = "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, END, *ROLES)

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Left out of training: generated tables and catalogues, bundled third-party code, and test inputs that are
# not Python.
LEFT_OUT_FOLDERS = (
    "site-packages",
    "__pycache__",
    "ensurepip",
    "pydoc_data",
    "lib-dynload",
    "data",
    "cjkencodings",
)
LEFT_OUT_PATTERN = re.compile(
    r"html/entities\.py$|encodings/(?!__init__|aliases|utf_8|idna|punycode|hex|base64)"
)
MOST_DIGITS = 0.12  # of a file's characters; above that it is a table
MOST_BYTES = 400_000

# One pre-token: a run of line ends with the next line's indentation; a word with the one sign or blank before
# it; up to three digits; a run of signs; blanks.
PRE_TOKEN = r"(?:[ \t]*\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+(?=\S)|\s+"

# First words of a docstring that read well after "the function that ..." once put into the third person.
VERBS_TEXT = """
Accept Add Append Apply Ask Assert Attempt Build Calculate Call Cancel Change Check Clean Clear Close
Collect Compare Compile Compute Connect Construct Convert Copy Count Create Decode Define Delete Determine
Disable Display Download Draw Emit Enable Encode Ensure Escape Evaluate Execute Extract Fetch Fill Filter
Find Finish Flush Format Generate Get Give Handle Ignore Implement Increment Indicate Initialize Insert
Install Invoke Iterate Join Launch List Load Locate Look Make Mark Match Merge Move Normalize Open Parse
Perform Pop Prepare Print Process Produce Provide Put Query Quote Raise Read Receive Record Register Reload
Remove Rename Render Replace Report Reset Resolve Restore Retrieve Return Run Save Scan Search Select Send
Set Show Skip Sort Split Start Stop Store Strip Take Test Tell Transform Translate Try Turn Unregister
Update Use Validate Verify Wait Wrap Write Yield
"""
VERBS = frozenset(VERBS_TEXT.split())

QUESTIONS = (
    "Write the function {name} that {what}",
    "Write the function that {what}",
    "Write a Python function that {what}",
    "Write the function `{name}` that {what}",
)


@dataclass(frozen=True)
class Corpus:
    """The texts, by path under the standard library's folder; `library` and `tests` are trained on."""

    library: dict[str, str]
    tests: dict[str, str]
    held_out: dict[str, str]


def is_test_of_held_out(path: str) -> bool:
    """Whether a path under Lib is a test (file or folder) of a held-out module."""
    if not path.startswith("test/"):
        return False
    return any(re.search(rf"(^|/)test_{module}(\.py$|/|_)", path) for module in HELD_OUT)


def read_corpus(folder: Path | None = None) -> Corpus:
    """Reads and divides the standard library; raises where a held-out module is missing.

    `folder` stands in for it (tests).
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    corpus = Corpus({}, {}, {})
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        path = relative.as_posix()
        if any(part in LEFT_OUT_FOLDERS for part in relative.parts) or is_test_of_held_out(path):
            continue
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if path.removesuffix(".py") in HELD_OUT:
            corpus.held_out[path] = text
            continue
        digest = hashlib.sha256(raw).hexdigest()
        digits = sum(character.isdigit() for character in text)
        if (
            len(raw) < 64
            or len(raw) > MOST_BYTES
            or digits > MOST_DIGITS * len(text)
            or digest in seen
            or LEFT_OUT_PATTERN.search(path)
        ):
            continue
        seen.add(digest)
        is_test = re.match(r"(test|idlelib/idle_test|lib2to3/tests)/", path)
        (corpus.tests if is_test else corpus.library)[path] = text
    missing = set(HELD_OUT) - {path.removesuffix(".py") for path in corpus.held_out}
    if missing:
        raise ValueError(f"{folder} lacks the held-out modules {sorted(missing)}")
    return corpus


def train_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, learnt on the training texts; encoding puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Library twice: it is what is held out, and there is more text of tests than of it.
    texts = [*corpus.library.values(), *corpus.library.values(), *corpus.tests.values()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def first_sentence(docstring: str) -> str | None:
    """The first sentence as the end of "... that": `Return the sum.` gives `returns the sum.`.

    None where unfit.
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    verb, _, rest = sentence.partition(" ")
    if not 15 <= len(sentence) <= 200:
        return None
    if verb in VERBS:
        third = verb.lower() + ("es" if verb.endswith(("ch", "sh", "x", "ss")) else "s")
        third = re.sub(r"([^aeiou])ys$", r"\1ies", third)
    elif (
        verb.removesuffix("s") in VERBS
        or verb.removesuffix("es") in VERBS
        or verb in ("Tries", "Applies", "Copies")
    ):
        third = verb.lower()
    else:
        return None
    return f"{third} {rest}".rstrip(".") + "."


def chat_pairs(texts: dict[str, str]) -> list[tuple[str, str]]:
    """(question, source) for every documented function of 4 to 60 lines, in order of path and line."""
    pairs = []
    for _, text in sorted(texts.items()):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
                continue
            what = first_sentence(ast.get_docstring(node) or "")
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if what is None or not 4 <= length <= 60:
                continue
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip("\n")
            which = hashlib.sha256(source.encode()).digest()[0] % len(QUESTIONS)
            pairs.append((QUESTIONS[which].format(name=node.name, what=what), source))
    return pairs


def render_pair(question: str, answer: str) -> str:
    """What CHAT_TEMPLATE makes of the two messages (a test compares them)."""
    return f"{BOS}<|user|>\n{question}{END}\n<|assistant|>\n{answer}{END}\n"


@dataclass(frozen=True)
class Tokens:
    """Token ids, u16, one array a document, special tokens included."""

    library: list[np.ndarray]
    tests: list[np.ndarray]
    pairs: list[np.ndarray]


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Encodes documents and pairs."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.uint16) for one in encoded]

    return Tokens(
        library=encode([f"{BOS}{text}{END}" for text in corpus.library.values()]),
        tests=encode([f"{BOS}{text}{END}" for text in corpus.tests.values()]),
        pairs=encode([render_pair(*pair) for pair in chat_pairs(corpus.library)]),
    )


class Windows:
    """Shuffled windows of `length + 1` tokens, without end.

    `take` is a function of the position alone, so the number of windows taken so far is all that a restart
    needs. A round holds every library document, every pair and a quarter of the test documents, another
    quarter each round.
    """

    TEST_PARTS = 4

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.starts = [0]  # the position of each round's first window, and of the round after the last known
        self.round: tuple[int, np.ndarray] | None = None

    def _make_round(self, number: int) -> np.ndarray:
        """u16[windows, length + 1]: one round, shuffled; what is left over at its end is dropped."""
        rng = np.random.default_rng([self.seed, number])
        tests = self.tokens.tests[number % self.TEST_PARTS :: self.TEST_PARTS]
        documents = [*self.tokens.library, *self.tokens.pairs, *tests]
        joined = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        count = len(joined) // (self.length + 1)
        if count == 0:
            raise ValueError(f"{len(joined)} tokens are fewer than one window of {self.length + 1}")
        windows = joined[: count * (self.length + 1)].reshape(count, self.length + 1)
        return windows[rng.permutation(count)]

    def take(self, position: int, count: int) -> np.ndarray:
        """i32[count, length + 1]: the windows from `position` on."""
        return np.stack([self._window(position + i) for i in range(count)]).astype(np.int32)

    def _window(self, position: int) -> np.ndarray:
        number = 0
        while True:
            if len(self.starts) <= number + 1:
                self.round = (number, self._make_round(number))
                self.starts.append(self.starts[-1] + len(self.round[1]))
            if position < self.starts[number + 1]:
                break
            number += 1
        if self.round is None or self.round[0] != number:
            self.round = (number, self._make_round(number))
        return self.round[1][position - self.starts[number]]
