"""What follows hidden states: drawing a token, and log-probabilities of tokens that are given.

Everything is a reduction over the vocabulary, so that a vocabulary sharded over devices stays sharded: a
filter is a threshold found by bisection, not a sort; a draw inverts the cumulative distribution block by
block. A row's bits depend on its own logits, parameters, seed and position alone.

Order, as in vLLM: token mask, logit bias, min_tokens, penalties, temperature, min-p, top-k, top-p. Filters
keep ties. Log-probabilities are the model's own, before all of these.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.engine.batch import EDITED, LOGPROBS, RESULT_WIDTH, SamplingRows
from jaxserve.scheduler.types import MAX_LOGPROBS
from sharding import mesh_axes, partition_spec, parts

BLOCK = 128  # tokens of the vocabulary that a draw looks at together


class Edits(NamedTuple):
    """What of the state changes logits, a row for each slot; see `EngineState`."""

    counts: Int[Array, "slots V"]
    prompt: UInt32[Array, "slots W"]
    allowed: UInt32[Array, "slots W"]
    bias_tokens: Int[Array, "slots n"]
    bias: Float[Array, "slots n"]


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    edits: Edits,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    mesh: Mesh | None = None,
) -> Int[Array, " B"]:
    """The token that each row, which holds slot `slots[b]`, draws for `positions`.

    mesh: that the vocabulary is divided over; None where it is not.
    """
    with jax.named_scope("sample"):
        edited = (rows.flags & EDITED) != 0

        def edit(logits: Array) -> Array:  # the slots' rows are read only where somebody needs them
            return _edit(logits, rows, jax.tree.map(lambda x: x[slots], edits), edited)

        logits = jax.lax.cond(jnp.any(edited), edit, lambda x: x, logits)
        early = positions < rows.min_end
        logits = jax.lax.cond(jnp.any(early), lambda x: _forbid_stop(x, rows, early), lambda x: x, logits)
        best, largest = _argmax(logits)
        greedy = rows.temperature == 0
        return jax.lax.cond(
            jnp.all(greedy),
            lambda x: best,
            lambda x: jnp.where(greedy, best, _draw(x, largest, rows, positions, mesh)),
            logits,
        )


def _argmax(x: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first index of the largest, and the largest, as two plain reductions: XLA's CPU code for `argmax`,
    one reduction over pairs, took 1.8 ms for 16 rows of 49,152 where this takes 0.3."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    largest = jnp.max(x, axis=-1)
    return jnp.min(jnp.where(x == largest[:, None], places, x.shape[1] - 1), axis=-1), largest


def _edit(
    logits: Float[Array, "B V"], rows: SamplingRows, edits: Edits, edited: Bool[Array, " B"]
) -> Float[Array, "B V"]:
    """edits: the rows' own."""
    vocab = logits.shape[1]
    kept = jnp.where(_bits(edits.allowed, vocab), logits, -jnp.inf)
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    kept = kept.at[index, edits.bias_tokens].add(edits.bias, mode="drop")
    generated = edits.counts > 0
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(kept > 0, kept / repetition, kept * repetition)
    kept = jnp.where(generated | _bits(edits.prompt, vocab), repeated, kept)
    kept = kept - rows.frequency_penalty[:, None] * edits.counts.astype(jnp.float32)
    kept = jnp.where(generated, kept - rows.presence_penalty[:, None], kept)
    return jnp.where(edited[:, None], kept, logits)


def _bits(words: UInt32[Array, "B W"], vocab: int) -> Bool[Array, "B V"]:
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :vocab] != 0


def _forbid_stop(
    logits: Float[Array, "B V"], rows: SamplingRows, early: Bool[Array, " B"]
) -> Float[Array, "B V"]:
    vocab = logits.shape[1]
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    targets = jnp.where(early[:, None] & (rows.stop >= 0), rows.stop, vocab)
    return logits.at[index, targets].set(-jnp.inf, mode="drop")


def _draw(
    logits: Float[Array, "B V"],
    largest: Float[Array, " B"],
    rows: SamplingRows,
    positions: Int[Array, " B"],
    mesh: Mesh | None,
) -> Int[Array, " B"]:
    """largest: of each row's logits. A filter that nobody asks for is a threshold of 0: a `lax.cond` around
    the odds themselves would copy them on a GPU."""
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    # Relative to the likeliest: 1 for it, and the order of floats from 0 to 1 is the order of their bits.
    odds = jnp.exp(logits / temperature[:, None] - (largest / temperature)[:, None])
    odds = _at_least(odds, rows.min_p)
    none = jnp.zeros(logits.shape[0], jnp.float32)
    limited = jnp.any((rows.top_k > 0) & (rows.top_k < logits.shape[1]))
    top_k = jax.lax.cond(limited, lambda odds: _top_k(odds, rows.top_k), lambda odds: none, odds)
    top_p = jax.lax.cond(
        jnp.any(rows.top_p < 1),
        lambda odds: _top_p(_at_least(odds, top_k), rows.top_p),
        lambda odds: none,
        odds,
    )
    odds = _at_least(odds, jnp.maximum(top_k, top_p))
    return _invert(odds, _uniform(rows, positions), mesh)


def _at_least(odds: Float[Array, "B V"], threshold: Float[Array, " B"]) -> Float[Array, "B V"]:
    return jnp.where(odds >= threshold[:, None], odds, 0.0)


def _top_k(odds: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The threshold below which a row's odds do not count."""
    vocab = odds.shape[1]
    wanted = jnp.where(k > 0, jnp.minimum(k, vocab), vocab)
    return _largest_threshold(odds, lambda at_least: jnp.sum(at_least, axis=-1, dtype=jnp.int32) >= wanted)


def _top_p(odds: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, " B"]:
    """As `_top_k`; 0 where p is 1."""
    wanted = jnp.where(p < 1, p, 0.0) * jnp.sum(odds, axis=-1)
    threshold = _largest_threshold(
        odds, lambda at_least: jnp.sum(jnp.where(at_least, odds, 0.0), axis=-1) >= wanted
    )
    return jnp.where(p < 1, threshold, 0.0)


def _largest_threshold(odds: Float[Array, "B V"], enough: object) -> Float[Array, " B"]:
    """The largest f32 t for which `enough(odds >= t)` holds; it holds for 0. By bisection over t's bits."""
    rows = odds.shape[0]
    one = 0x3F800000  # the bits of 1.0

    def body(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at low, not at high
        middle = low + (high - low) // 2
        ok = enough(odds >= _from_bits(middle)[:, None])  # type: ignore[operator]
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, body, (jnp.zeros(rows, jnp.int32), jnp.full(rows, one + 1, jnp.int32)))
    return _from_bits(low)


def _from_bits(bits: Int[Array, " B"]) -> Float[Array, " B"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _uniform(rows: SamplingRows, positions: Int[Array, " B"]) -> Float[Array, " B"]:
    """One number in [0, 1) per row, of 24 bits, from its seed and position alone: the words of the key
    `fold_in(seed, position)` are themselves the hash's output, so no second hash is needed."""
    words = jnp.stack([rows.seed_high, rows.seed_low], axis=-1)
    keys = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(words, jnp.uint32), impl="threefry2x32")
    folded = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, positions))
    return (folded[:, 0] >> 8).astype(jnp.float32) * 2.0**-24


def _invert(odds: Float[Array, "B V"], u: Float[Array, " B"], mesh: Mesh | None) -> Int[Array, " B"]:
    """The first token at which the cumulative sum of `odds` exceeds u times its total.

    Over several devices by their sums first, then on each within its own part of the vocabulary: blocks that
    cross from one to the next would gather them.
    """
    if mesh is None or parts(mesh, "vocab") == 1:
        return _within(odds, u, relative=True)
    axes = mesh_axes("vocab")

    def own(part: Array, u: Array) -> Array:
        sums = jax.lax.all_gather(jnp.sum(part, axis=-1), axes, axis=1)
        shard, left = _locate(sums, u, relative=True)
        here = jax.lax.axis_index(axes)
        token = _within(part, left, relative=False) + here * part.shape[1]
        return jax.lax.psum(jnp.where(shard == here, token, 0), axes)

    everywhere, spec = PartitionSpec(), partition_spec(("slot", "vocab"))
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(spec, everywhere), out_specs=everywhere, check_vma=False)
    return mapped(odds, u)


def _within(odds: Float[Array, "B V"], target: Float[Array, " B"], *, relative: bool) -> Int[Array, " B"]:
    """The first token at which the cumulative sum exceeds the target, or the target times the total."""
    count, vocab = odds.shape
    blocks = jnp.pad(odds, ((0, 0), (0, -vocab % BLOCK))).reshape(count, -1, BLOCK)
    index, left = _locate(jnp.sum(blocks, axis=-1), target, relative=relative)
    chosen = jnp.arange(blocks.shape[1], dtype=jnp.int32)[None, :] == index[:, None]
    block = jnp.sum(jnp.where(chosen[:, :, None], blocks, 0.0), axis=1)
    inner, _ = _locate(block, left, relative=False)
    return index * BLOCK + inner


def _locate(
    weights: Float[Array, "B n"], target: Float[Array, " B"], *, relative: bool
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(the first entry whose cumulative sum exceeds the target, what of the target lies within it).

    Sums are a product with a triangle: one matrix product where a scan would be a dozen kernels. Rounding can
    leave the target beyond the last sum, or a sum above its neighbour's where nothing was added: only
    entries above 0 are taken, the last of them at the end.
    """
    size = weights.shape[1]
    triangle = jnp.triu(jnp.ones((size, size), jnp.float32))
    sums = jnp.matmul(weights, triangle, precision=jax.lax.Precision.HIGHEST)
    target = target * sums[:, -1] if relative else target
    places = jnp.arange(size, dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    beyond = (sums > target[:, None]) & (weights > 0)
    index = jnp.minimum(jnp.min(jnp.where(beyond, places, size), axis=-1), last)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def logprob_columns(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], mesh: Mesh
) -> Int[Array, "B result"]:
    """Rows of RESULT_WIDTH: token, its logprob and rank, then the likeliest tokens and their logprobs."""
    with jax.named_scope("logprobs"):
        total = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1)[:, 0]
        rank = 1 + jnp.sum(logits > own[:, None], axis=-1, dtype=jnp.int32)
        values, ids = _top(logits, mesh)
        return _columns(tokens, own - total, rank, ids, values - total[:, None])


def result_columns(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], rows: SamplingRows, mesh: Mesh
) -> Int[Array, "B result"]:
    """As `logprob_columns` where any row asks for logprobs, else the tokens alone."""
    bare = jnp.zeros((tokens.shape[0], RESULT_WIDTH), jnp.int32).at[:, 0].set(tokens)
    return jax.lax.cond(
        jnp.any((rows.flags & LOGPROBS) != 0),
        lambda x: logprob_columns(x, tokens, mesh),
        lambda x: bare,
        logits,
    )


def _top(logits: Float[Array, "B V"], mesh: Mesh) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The MAX_LOGPROBS likeliest, best first: on each device among its own, then among those."""
    shards = parts(mesh, "vocab")
    width = logits.shape[1] // shards
    keep = min(MAX_LOGPROBS, width)
    if shards == 1:
        values, ids = jax.lax.top_k(logits, keep)
    else:

        def best(part: Array) -> tuple[Array, Array]:
            axes = mesh_axes("vocab")
            values, ids = jax.lax.top_k(part, keep)
            ids = ids + jax.lax.axis_index(axes) * width
            values, ids = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (values, ids))
            values, order = jax.lax.top_k(values, min(MAX_LOGPROBS, values.shape[1]))
            return values, jnp.take_along_axis(ids, order, axis=1)

        everywhere, spec = PartitionSpec(), partition_spec(("slot", "vocab"))
        mapped = jax.shard_map(best, mesh=mesh, in_specs=spec, out_specs=everywhere, check_vma=False)
        values, ids = mapped(logits)
    short = ((0, 0), (0, MAX_LOGPROBS - values.shape[1]))  # a vocabulary smaller than MAX_LOGPROBS
    return jnp.pad(values, short, constant_values=-jnp.inf), jnp.pad(ids, short, constant_values=-1)


def _columns(tokens: Array, logprobs: Array, ranks: Array, ids: Array, values: Array) -> Array:
    def bits(x: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    return jnp.concatenate(
        [tokens[:, None], bits(logprobs)[:, None], ranks[:, None], ids, bits(values)], axis=1
    )
