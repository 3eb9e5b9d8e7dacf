"""Drawing tokens: each method's frequencies against a distribution worked out with NumPy in float64, by
chi-square; what must hold exactly; log-probabilities and ranks.

Seeds are fixed, so each test passes or fails the same way every time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jaxserve.engine import batch, heads
from jaxserve.engine.batch import EDITED, LOGPROBS, SamplingRows
from jaxserve.scheduler.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS
from sharding import make_mesh, parse_mesh

VOCABULARY = 200  # no multiple of 128, of which a draw makes blocks, nor of 32
DRAWS = 8192
LEAST_P = 1e-4
ONE, TWO = (make_mesh(parse_mesh(f"tensor={devices}")) for devices in (1, 2))


@jax.jit
def sample(logits, rows, edits, positions):
    """Row b holds slot b."""
    return heads.sample(logits, rows, edits, jnp.arange(logits.shape[0], dtype=jnp.int32), positions)


logprob_columns = jax.jit(heads.logprob_columns, static_argnums=2)


@dataclasses.dataclass
class Draw:
    """One way of drawing. allowed: tokens, None for all; bias: token to addition; prompt: its tokens;
    counts: how often each was generated. early: the draw stands before `min_tokens`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    allowed: tuple[int, ...] | None = None
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    prompt: tuple[int, ...] = ()
    counts: dict[int, int] = dataclasses.field(default_factory=dict)
    stop: tuple[int, ...] = ()
    early: bool = False

    @property
    def edited(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.allowed or self.bias or penalties != (1.0, 0.0, 0.0))


MIN_END = 100_000  # where `early` draws stand before


def device_rows(ways: list[Draw], vocabulary: int) -> tuple[SamplingRows, heads.Edits]:
    """One row for each way of drawing, seeds 0; as the state would hold them."""
    count, words = len(ways), -(-vocabulary // 32)

    def floats(name: str) -> NDArray[np.float32]:
        return np.array([getattr(way, name) for way in ways], np.float32)

    stop = np.full((count, MAX_STOP_TOKENS), -1, np.int32)
    counts = np.zeros((count, vocabulary), np.int32)
    prompt, allowed = np.zeros((2, count, words * 32), np.bool_)
    bias_tokens = np.full((count, MAX_LOGIT_BIAS), vocabulary, np.int32)
    bias = np.zeros((count, MAX_LOGIT_BIAS), np.float32)
    for i, way in enumerate(ways):
        stop[i, : len(way.stop)] = way.stop
        counts[i, list(way.counts)] = list(way.counts.values())
        prompt[i, list(way.prompt)] = True
        allowed[i, slice(None) if way.allowed is None else list(way.allowed)] = True
        bias_tokens[i, : len(way.bias)] = list(way.bias)
        bias[i, : len(way.bias)] = list(way.bias.values())
    zeros = np.zeros(count, np.int32)
    rows = SamplingRows(
        *(floats(name) for name in batch._FLOATS),
        top_k=np.array([way.top_k for way in ways], np.int32),
        seed_low=zeros,
        seed_high=zeros,
        min_end=np.array([MIN_END if way.early else 0 for way in ways], np.int32),
        limit=zeros,
        flags=np.array([EDITED if way.edited else 0 for way in ways], np.int32),
        stop=stop,
    )

    def bits(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
        return np.packbits(mask, axis=1, bitorder="little").view(np.uint32)

    return rows, heads.Edits(counts, bits(prompt), bits(allowed), bias_tokens, bias)


def tokens_of(
    way: Draw,
    logits: NDArray[np.float32],
    *,
    seed_low: NDArray[Any] | int = 0,
    seed_high: NDArray[Any] | int = 0,
    positions: NDArray[Any] | int = 0,
    draws: int = DRAWS,
) -> NDArray[np.int32]:
    """Many draws of one way from one row of logits, with seeds and positions of their own."""
    rows, edits = device_rows([way], len(logits))
    rows, edits = jax.tree.map(lambda x: np.repeat(x, draws, axis=0), (rows, edits))

    def ints(x: NDArray[Any] | int) -> NDArray[np.int32]:
        return np.broadcast_to(np.asarray(x, np.int64), draws).astype(np.uint32).view(np.int32)

    rows = rows._replace(seed_low=ints(seed_low), seed_high=ints(seed_high))
    return np.asarray(sample(np.broadcast_to(logits, (draws, len(logits))), rows, edits, ints(positions)))


def distribution(way: Draw, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The probability of every token, by the definitions: token by token, in float64, with a sort."""
    x = logits.astype(np.float64)
    if way.allowed is not None:
        x[[token for token in range(len(x)) if token not in way.allowed]] = -np.inf
    for token, value in way.bias.items():
        x[token] += value
    for token in range(len(x)):
        times = way.counts.get(token, 0)
        if times or token in way.prompt:
            x[token] = (
                x[token] / way.repetition_penalty if x[token] > 0 else x[token] * way.repetition_penalty
            )
        x[token] -= way.frequency_penalty * times + way.presence_penalty * (times > 0)
    if way.early:
        x[list(way.stop)] = -np.inf
    p = np.exp((x - x.max()) / way.temperature)
    p[p < way.min_p * p.max()] = 0
    if 0 < way.top_k < len(p):
        p[p < np.sort(p)[-way.top_k]] = 0
    p /= p.sum()
    if way.top_p < 1:
        falling = np.sort(p)[::-1]
        last = np.flatnonzero(np.cumsum(falling) >= way.top_p)[0]
        p[p < falling[last]] = 0
    return p / p.sum()


def check_frequencies(tokens: NDArray[np.int32], p: NDArray[np.float64]) -> None:
    """What cannot be drawn is not; the rest as often as `p` says. Rare tokens are counted together."""
    observed = np.bincount(tokens, minlength=len(p))
    assert not observed[p == 0].any(), "a token of probability 0 was drawn"
    expected = p * len(tokens)
    order = np.argsort(expected)
    rare = order[: np.searchsorted(np.cumsum(expected[order]), 10.0) + 1]
    usual = np.setdiff1d(np.arange(len(p)), rare)
    if len(usual):
        groups = [np.append(x[usual], x[rare].sum()) for x in (observed, expected)]
        assert scipy.stats.chisquare(*groups).pvalue > LEAST_P


def wavy(vocabulary: int = VOCABULARY, seed: int = 0) -> NDArray[np.float32]:
    """Logits with a few likely tokens and a long tail, of both signs."""
    return np.random.default_rng(seed).normal(0.0, 2.0, vocabulary).astype(np.float32)


def likeliest(count: int) -> list[int]:
    return np.argsort(-wavy())[:count].tolist()


FIRST, SECOND, THIRD, FOURTH, *_ = likeliest(8)
PENALISED = {"prompt": (FIRST, 3, 190), "counts": {SECOND: 1, THIRD: 4, 5: 2}}

WAYS: dict[str, Draw] = {
    "plain": Draw(),
    "temperature 0.5": Draw(temperature=0.5),
    "temperature 3": Draw(temperature=3.0),
    "temperature 100": Draw(temperature=100.0),
    "top_k 1": Draw(top_k=1),
    "top_k 7": Draw(top_k=7),
    "top_k all but one": Draw(top_k=VOCABULARY - 1),
    "top_k of the whole vocabulary": Draw(top_k=VOCABULARY),
    "top_k beyond the vocabulary": Draw(top_k=2**31 - 1),
    "top_p 0.01": Draw(top_p=0.01),
    "top_p 0.5": Draw(top_p=0.5),
    "top_p 0.95": Draw(top_p=0.95),
    "top_p just below 1": Draw(top_p=float(np.float32(1) - np.float32(2**-24))),
    "min_p 0.02": Draw(min_p=0.02),
    "min_p 0.5": Draw(min_p=0.5),
    "min_p 1": Draw(min_p=1.0),
    "top_k and top_p": Draw(top_k=20, top_p=0.8),
    "top_k, top_p, min_p and temperature": Draw(temperature=1.7, top_k=60, top_p=0.9, min_p=0.05),
    "repetition penalty": Draw(repetition_penalty=1.8, **PENALISED),
    "repetition reward": Draw(repetition_penalty=0.6, **PENALISED),
    "presence penalty": Draw(presence_penalty=1.5, **PENALISED),
    "frequency penalty": Draw(frequency_penalty=0.7, **PENALISED),
    "negative penalties": Draw(presence_penalty=-1.0, frequency_penalty=-0.5, **PENALISED),
    "three penalties": Draw(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, temperature=0.8, **PENALISED
    ),
    "logit bias": Draw(bias={FIRST: -100.0, 0: 4.0, 199: 5.0, 127: 3.0, 128: 3.0}),
    "allowed tokens": Draw(allowed=(0, 31, 32, 127, 128, 199, FIRST)),
    "one allowed token": Draw(allowed=(199,)),
    "allowed tokens and a bias": Draw(allowed=(1, 2, 3), bias={1: 2.0, 50: 100.0}),
    "allowed tokens and top_p": Draw(allowed=tuple(range(0, VOCABULARY, 3)), top_p=0.7),
    "stop tokens": Draw(stop=(FIRST, SECOND, 199)),
    "stop tokens before min_tokens": Draw(stop=(FIRST, SECOND, 199), early=True),
    "everything": Draw(
        temperature=1.4, top_k=100, top_p=0.97, min_p=0.001, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, allowed=tuple(range(5, VOCABULARY)), bias={FOURTH: 1.0, 2: 9.0},
        stop=(FIRST,), early=True, **PENALISED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_frequencies(way: Draw) -> None:
    """Half of the draws with seeds of their own, half with one seed at positions of their own."""
    index = np.arange(DRAWS)
    own = index < DRAWS // 2
    tokens = tokens_of(way, wavy(), seed_low=np.where(own, 11 + index, 5), positions=np.where(own, 7, index))
    check_frequencies(tokens, distribution(way, wavy()))


def test_the_reference_itself() -> None:
    """By hand: odds 8, 4, 2, 1, 1 of 16."""
    logits = np.log(np.array([4, 8, 1, 2, 1], np.float32))
    assert distribution(Draw(top_k=2), logits) == pytest.approx([1 / 3, 2 / 3, 0, 0, 0])
    assert distribution(Draw(top_k=4), logits) == pytest.approx(
        np.array([4, 8, 1, 2, 1]) / 16
    )  # a tie is kept
    assert distribution(Draw(top_p=0.51), logits) == pytest.approx([1 / 3, 2 / 3, 0, 0, 0])
    assert distribution(Draw(top_p=0.8), logits) == pytest.approx([2 / 7, 4 / 7, 0, 1 / 7, 0])
    assert distribution(Draw(min_p=0.2), logits) == pytest.approx([2 / 7, 4 / 7, 0, 1 / 7, 0])
    assert distribution(Draw(temperature=0.5), logits) == pytest.approx(np.array([16, 64, 1, 4, 1]) / 86)
    assert distribution(Draw(allowed=(2, 3)), logits) == pytest.approx([0, 0, 1 / 3, 2 / 3, 0])


@pytest.mark.parametrize(
    ("way", "kept"), [(Draw(top_k=2), 5), (Draw(top_p=0.3), 5), (Draw(min_p=1.0), 5), (Draw(top_k=6), 200)]
)
def test_ties_are_kept_whole(way: Draw, kept: int) -> None:
    """Five best tokens of equal logit, the other 195 all alike."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[0, 60, 127, 128, 199]] = 3.0
    p = distribution(way, logits)
    assert np.count_nonzero(p) == kept
    check_frequencies(tokens_of(way, logits, seed_low=np.arange(DRAWS)), p)


@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 256, 1000])
def test_vocabularies(vocabulary: int) -> None:
    logits = wavy(vocabulary)
    for way in (Draw(), Draw(top_p=0.9, top_k=50)):
        tokens = tokens_of(way, logits, seed_low=np.arange(2048), draws=2048)
        check_frequencies(tokens, distribution(way, logits))


@pytest.mark.parametrize(
    "seeds",
    [
        {"seed_low": np.arange(DRAWS)},
        {"seed_high": np.arange(DRAWS)},
        {"seed_low": 0xFFFFFFFF - np.arange(DRAWS), "seed_high": 0x7FFFFFFF},
        {"positions": np.arange(DRAWS)},
        {"positions": 100_000 + np.arange(DRAWS), "seed_low": 3},
        {"positions": np.arange(DRAWS), "seed_low": np.arange(DRAWS)},
        {"positions": np.arange(DRAWS), "seed_low": np.arange(DRAWS)[::-1]},
        {"seed_low": np.arange(DRAWS) * (0x9E3779B97F4A7C15 % 2**32) % 2**32},  # siblings of one request
    ],
    ids=lambda seeds: "-".join(seeds),
)
def test_neighbouring_draws_are_independent(seeds: dict[str, Any]) -> None:
    """Eight equal tokens: the pair of one draw and the next is each of the 64 equally often."""
    way = Draw(allowed=(0, 1, 63, 64, 127, 128, 130, 199))
    tokens = tokens_of(way, np.zeros(VOCABULARY, np.float32), **seeds)
    place = np.searchsorted(np.array(way.allowed), tokens)
    for apart in (1, 2):
        pairs = place[:-apart:2] * 8 + place[apart::2]
        check_frequencies(pairs, np.full(64, 1 / 64))


# -- exactly -----------------------------------------------------------------------------------------------


def test_greedy() -> None:
    """The first of the best, with the edits, whatever the filters say; beside rows that draw."""
    logits = np.stack([wavy(seed=i) for i in range(6)])
    logits[1, [17, 150]] = 50.0
    ways = [
        Draw(temperature=0.0),
        Draw(temperature=0.0, top_k=5, top_p=0.1, min_p=0.5),
        Draw(temperature=0.0, bias={77: 60.0}),
        Draw(temperature=0.0, allowed=(9,)),
        Draw(temperature=0.0, stop=(int(np.argmax(logits[4])),), early=True),
        Draw(temperature=1.0),
    ]
    rows, edits = device_rows(ways, VOCABULARY)
    positions = np.full(6, 5, np.int32)
    runner_up = int(np.argsort(-logits[4])[1])
    want = [int(np.argmax(logits[0])), 17, 77, 9, runner_up]
    assert np.asarray(sample(logits, rows, edits, positions))[:5].tolist() == want
    rows = rows._replace(temperature=np.zeros(6, np.float32))  # another branch: nobody draws
    assert np.asarray(sample(logits, rows, edits, positions))[:5].tolist() == want


def test_min_tokens_ends_exactly_there() -> None:
    logits = wavy()[None]
    rows, edits = device_rows([Draw(temperature=0.0, stop=(FIRST,), early=True)], VOCABULARY)
    drawn = [
        int(sample(logits, rows, edits, np.array([position], np.int32))[0])
        for position in (0, MIN_END - 1, MIN_END, MIN_END + 1)
    ]
    assert drawn == [SECOND, SECOND, FIRST, FIRST]


def test_rows_without_the_flag_ignore_the_edits() -> None:
    """A slot's edits may be left over from the sequence before; a neighbour's flag does not wake them."""
    logits = np.stack([wavy(), wavy()])
    ways = [Draw(temperature=0.0, allowed=(3,), bias={4: 99.0}, counts={FIRST: 9}, frequency_penalty=2.0)] * 2
    rows, edits = device_rows(ways, VOCABULARY)
    rows = rows._replace(flags=np.array([0, EDITED], np.int32))
    assert np.asarray(sample(logits, rows, edits, np.zeros(2, np.int32))).tolist() == [FIRST, 3]


def test_the_same_draw_in_any_company() -> None:
    """A row's token depends on its own logits, options, seed and position; not on the batch's size, its place
    in it, nor on what the others ask for."""
    ways = list(WAYS.values())
    rng = np.random.default_rng(1)
    logits = np.stack([wavy(seed=i) for i in range(len(ways))])
    rows, edits = device_rows(ways, VOCABULARY)
    rows = rows._replace(
        seed_low=rng.integers(-(2**31), 2**31, len(ways)).astype(np.int32),
        seed_high=rng.integers(0, 2**31, len(ways)).astype(np.int32),
    )
    positions = rng.integers(0, MIN_END, len(ways)).astype(np.int32)
    everything = (logits, rows, edits, positions)
    want = np.asarray(sample(*everything))
    company = [rng.permutation(len(ways))[:size] for size in (1, 2, 5, 16, len(ways)) for _ in range(4)]
    for chosen in company:
        got = np.asarray(sample(*take(everything, chosen)))
        np.testing.assert_array_equal(got, want[chosen])


def take(tree: Any, chosen: NDArray[Any] | slice) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], tree)


def test_bits_do_not_depend_on_the_batch() -> None:
    """Also what a draw rests on: cumulative sums and thresholds, bit for bit at every batch size."""
    odds = np.exp(np.stack([wavy(seed=i) - wavy(seed=i).max() for i in range(32)]))
    u = np.random.default_rng(0).random(32).astype(np.float32)
    everything = (odds, u, np.linspace(0.1, 0.99, 32).astype(np.float32), np.arange(1, 33).astype(np.int32))

    @jax.jit
    def parts(odds: jax.Array, u: jax.Array, p: jax.Array, k: jax.Array) -> dict[str, jax.Array]:
        index, left = heads._locate(odds, u, relative=True)
        return {"index": index, "left": left, "p": heads._top_p(odds, p), "k": heads._top_k(odds, k)}

    want = parts(*everything)
    for size in (1, 2, 3, 8, 16):
        got = parts(*take(everything, slice(-size, None)))
        for name, values in take(want, slice(-size, None)).items():
            np.testing.assert_array_equal(np.asarray(got[name]), values, err_msg=f"{name} at {size}")


def test_the_edges_of_the_cumulative_sum() -> None:
    """A target on, just below or just above a sum: the entry has weight, its sums lie around the target."""
    rng = np.random.default_rng(0)
    weights = rng.random((4096, 128)).astype(np.float32) * (rng.random((4096, 128)) < 0.2)
    weights[np.arange(4096), rng.integers(0, 128, 4096)] = 1.0
    weights = weights.astype(np.float32)
    sums = np.cumsum(weights.astype(np.float64), axis=1)
    on = sums[np.arange(4096), rng.integers(0, 128, 4096)].astype(np.float32)
    locate = jax.jit(lambda weights, target: heads._locate(weights, target, relative=False))
    for target in (on, np.nextafter(on, np.float32(0)), np.nextafter(on, np.float32(99)), 2 * on, 0 * on):
        index, left = map(np.asarray, locate(weights, target))
        rows = np.arange(4096)
        assert (weights[rows, index] > 0).all() and (left >= 0).all()
        inside = np.minimum(target, sums[:, -1])
        assert (sums[rows, index] >= inside - 1e-4).all()
        assert (sums[rows, index] - weights[rows, index] <= inside + 1e-4).all()


def test_extreme_logits() -> None:
    """Nothing overflows, and what is impossible stays so."""
    high = np.full(VOCABULARY, -1e4, np.float32)
    high[[3, 130]] = 1e4
    index = np.arange(VOCABULARY)
    last = set(range(151, VOCABULARY))  # where the other logits are -inf
    cases: list[tuple[NDArray[Any], Draw, set[int]]] = [
        (high, Draw(), {3, 130}),
        (high, Draw(temperature=1e-5), {3, 130}),
        (high, Draw(top_p=0.9, top_k=3), {3, 130}),
        (-high, Draw(temperature=0.5), set(range(VOCABULARY)) - {3, 130}),
        (np.full(VOCABULARY, 1e4), Draw(top_p=0.99), set(range(VOCABULARY))),
        (wavy(), Draw(temperature=1e-5), {FIRST}),
        (wavy(), Draw(temperature=1e-5, top_p=0.5, top_k=40, min_p=0.1), {FIRST}),
        (wavy(), Draw(top_p=1e-9), {FIRST}),
        (np.where(index == 77, 0, -np.inf), Draw(top_p=0.5), {77}),
        (np.where(index > 150, 0, -np.inf), Draw(top_k=9), last),
        (np.where(index > 150, 2, -np.inf), Draw(repetition_penalty=2.0, prompt=tuple(index)), last),
    ]
    for logits, way, possible in cases:
        drawn = set(tokens_of(way, logits.astype(np.float32), seed_low=np.arange(DRAWS)).tolist())
        assert drawn <= possible
        assert len(drawn) > 0.9 * len(possible)


def test_nothing_allowed_still_draws_a_token_of_the_vocabulary() -> None:
    """All stop tokens, none allowed yet: there is no right answer, but no token beyond the vocabulary."""
    rows, edits = device_rows([Draw(allowed=(5,), stop=(5,), early=True)] * 2, VOCABULARY)
    rows = rows._replace(temperature=np.array([0.0, 1.0], np.float32))
    drawn = np.asarray(sample(np.stack([wavy()] * 2), rows, edits, np.zeros(2, np.int32)))
    assert ((drawn >= 0) & (drawn < VOCABULARY)).all()


# -- log-probabilities -------------------------------------------------------------------------------------


def expected_results(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> batch.Results:
    wide = logits.astype(np.float64)
    logprobs = wide - scipy.special.logsumexp(wide, axis=1, keepdims=True)
    own = np.take_along_axis(wide, tokens[:, None], axis=1)
    top = np.argsort(-wide, axis=1, kind="stable")[:, :MAX_LOGPROBS].astype(np.int32)
    values = np.take_along_axis(logprobs, top, axis=1)
    short = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    return batch.Results(
        tokens,
        np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0],
        1 + np.count_nonzero(wide > own, axis=1).astype(np.int32),
        np.pad(top, short, constant_values=-1),
        np.pad(values, short, constant_values=-np.inf),
    )


@pytest.mark.parametrize("vocabulary", [8, 30, 200, 1024])
@pytest.mark.parametrize("mesh", [ONE, TWO], ids=["whole", "in two parts"])
def test_logprobs_and_ranks(vocabulary: int, mesh: Mesh) -> None:
    """With ties, which stand in the order of their ids; whole, and with the vocabulary on two devices."""
    logits = np.stack([wavy(vocabulary, seed=i) for i in range(16)])
    logits[3] = 0.5
    logits[4] = np.round(logits[4]) + 0.0  # without a -0.0, which stands behind 0.0
    logits[5] *= 1000
    tokens = np.random.default_rng(0).integers(0, vocabulary, 16).astype(np.int32)
    got = batch.unpack_results(np.asarray(logprob_columns(logits, tokens, mesh)))
    want = expected_results(logits, tokens)
    for name in ("tokens", "ranks", "top_tokens"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_logprobs_only_where_asked_for() -> None:
    """Nobody asks: the tokens alone. One asks: all rows have them."""
    logits = np.stack([wavy(seed=i) for i in range(3)])
    rows, _ = device_rows([Draw()] * 3, VOCABULARY)
    tokens = np.array([4, 7, -1], np.int32)
    run = jax.jit(heads.result_columns, static_argnums=3)
    bare = np.asarray(run(logits, tokens, rows, ONE))
    assert bare[:, 0].tolist() == [4, 7, -1] and not bare[:, 1:].any()
    rows = rows._replace(flags=np.array([0, LOGPROBS, 0], np.int32))
    full = np.asarray(run(logits, tokens, rows, ONE))
    np.testing.assert_array_equal(full, np.asarray(logprob_columns(logits, tokens, ONE)))


def test_a_vocabulary_sharded_over_two_devices() -> None:
    """The same tokens and results, though no device sees a whole row."""
    over_vocabulary = NamedSharding(TWO, PartitionSpec(None, "tensor"))
    everywhere = NamedSharding(TWO, PartitionSpec())
    ways = [way for way in WAYS.values() if way.allowed != (199,)]
    logits = np.stack([wavy(256, seed=i) for i in range(len(ways))])
    rows, edits = device_rows(ways, 256)
    rows = rows._replace(seed_low=np.arange(len(ways), dtype=np.int32))
    positions = np.zeros(len(ways), np.int32)
    want = np.asarray(sample(logits, rows, edits, positions))

    def place(x: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf), sharding), x)

    split = place(logits, over_vocabulary)
    edits = place(edits, everywhere)._replace(counts=place(edits.counts, over_vocabulary))
    got = sample(split, place(rows, everywhere), edits, place(positions, everywhere))
    np.testing.assert_array_equal(np.asarray(got), want)
    results = np.asarray(logprob_columns(split, place(want, everywhere), TWO))
    whole = np.asarray(logprob_columns(logits, want, ONE))
    np.testing.assert_array_equal(results[:, [0, *range(2, 3 + MAX_LOGPROBS)]], whole[:, [0, *range(2, 23)]])
    np.testing.assert_allclose(
        batch.unpack_results(results).top_logprobs, batch.unpack_results(whole).top_logprobs, rtol=1e-5
    )
