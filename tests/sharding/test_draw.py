"""Drawing over a divided vocabulary: the tokens that one device draws, and its logprobs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine import heads
from jaxserve.scheduler.types import MAX_LOGPROBS
from sharding import make_mesh, named_sharding, parse_mesh

ROWS = 512


@pytest.mark.parametrize("shape", ["tensor=2", "tensor=8", "tensor=2,expert=4"])
@pytest.mark.parametrize("width", [128, 202, 16])  # of one of eight parts
def test_the_token_at_which_the_sum_is_reached(shape: str, width: int) -> None:
    """Small whole numbers for odds, whose sums are exact, many of them 0, and whole parts, too."""
    rng = np.random.default_rng(width)
    odds = rng.integers(0, 9, (ROWS, 8, width)) * (rng.random((ROWS, 8, width)) < 0.3)
    odds = odds * (rng.random((ROWS, 8, 1)) < 0.6)
    odds[:, 3, 5] += odds.sum(axis=(1, 2)) == 0
    odds = odds.reshape(ROWS, -1).astype(np.float32)
    u = (rng.integers(0, 2**24, ROWS) * 2.0**-24).astype(np.float32)
    u[:2] = 0.0, 1 - 2.0**-24
    mesh = make_mesh(parse_mesh(shape), kv_heads=2)
    place = named_sharding(mesh, ("slot", "vocab"))
    draw = jax.jit(lambda odds, u: heads._invert(odds, u, mesh))
    got = np.asarray(draw(jax.device_put(odds, place), jnp.asarray(u)))
    sums = np.cumsum(odds.astype(np.float64), axis=1)
    target = (u * sums[:, -1].astype(np.float32)).astype(np.float64)
    want = np.argmax(sums > target[:, None], axis=1)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want // width)) == 8


@pytest.mark.parametrize("shape", ["tensor=8", "tensor=2,expert=4"])
def test_logprobs(shape: str) -> None:
    """Token, rank and candidates to the bit; logprobs, whose sum goes over other parts, to rounding."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (8, 8 * 202)).astype(np.float32)
    tokens = rng.integers(0, logits.shape[1], 8).astype(np.int32)
    run = jax.jit(heads.logprob_columns, static_argnums=2)
    want = np.asarray(run(logits, tokens, make_mesh(parse_mesh(""))))
    mesh = make_mesh(parse_mesh(shape), kv_heads=2)
    got = np.asarray(run(jax.device_put(logits, named_sharding(mesh, ("slot", "vocab"))), tokens, mesh))
    exact = [0, *range(2, 3 + MAX_LOGPROBS)]
    np.testing.assert_array_equal(got[:, exact], want[:, exact])
    rest = [1, *range(3 + MAX_LOGPROBS, got.shape[1])]
    values = [np.ascontiguousarray(x[:, rest]).view(np.float32) for x in (got, want)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
