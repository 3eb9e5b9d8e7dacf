"""Each kernel's time on the chip at hand, against what that chip was measured to reach.

    python -m pallas_kernels.bench [--json FILE] [--repeats N] [--only NAME]

First the limits: how fast memory is copied and read, and how fast bf16 matrices are multiplied. Then, for
each workload, every implementation that runs here and the best library's kernel, in the same run: held
against the XLA reference, then timed. A decode's limit is the copy rate, a prefill's the matrix rate; the
shares are of these. On a CPU the sizes are tiny and the figures mean nothing: it shows only that this runs.

A time is that of one call within a compiled loop of calls, each taking the output of the one before as its
query, so that dispatch is not in it; the median of the repeats. One layer of Llama 3.1 8B's shape (32 query
heads, 8 key/value heads of 128, bf16, pages of 64). Bytes: the cached keys and values of every row, the
queries and the outputs; operations: 4 for each query, head, visible key and column.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, prefill_attention
from pallas_kernels.chips import this_chip
from pallas_kernels.decode_attention import implementation_for as decode_implementation
from pallas_kernels.prefill_attention import implementation_for as prefill_implementation

KV_HEADS, GROUP, SIZE, PAGE = 8, 4, 128, 64
HEADS, WIDTH = KV_HEADS * GROUP, 2 * KV_HEADS * SIZE
SCALE = SIZE**-0.5
TOLERANCE = 2e-2  # of the largest value: two roundings to bf16 apart
ALL = 2**30
TIMED = 0.05  # seconds that one timed loop should take at least


@dataclasses.dataclass(frozen=True)
class Workload:
    """rows: sequences of `length` cached positions. tokens: of each row's prompt that is prefilled; 0 is a
    decode."""

    name: str
    rows: int
    length: int
    tokens: int = 0

    @property
    def bytes(self) -> int:
        queries = self.rows * (self.tokens or 1)
        return 2 * (self.rows * self.length * WIDTH + 2 * queries * HEADS * SIZE)

    @property
    def operations(self) -> int:
        pairs = self.length if not self.tokens else self.tokens * (2 * self.length - self.tokens + 1) // 2
        return 4 * self.rows * pairs * HEADS * SIZE


WORKLOADS = (
    Workload("decode 64 x 1k", 64, 1024),
    Workload("decode 64 x 8k", 64, 8192),
    Workload("decode 4 x 128k", 4, 131072),
    Workload("prefill 1 x 8k", 1, 8192, 8192),
)
TINY = (Workload("decode 4 x 128", 4, 128), Workload("prefill 1 x 128", 1, 128, 128))


def seconds(step: Callable[[Any], Any], carry: Any, repeats: int) -> float:
    """Of one `step`, which takes and gives a carry: the median over `repeats` loops of many of them."""

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def loop(carry: Any, count: int) -> Any:
        return jax.lax.scan(lambda carry, _: (step(carry), None), carry, None, length=count)[0]

    carry = jax.tree.map(jnp.copy, carry)  # given away, as the engine gives its pool: nothing is copied

    def once(count: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(carry, count))
        return time.perf_counter() - start

    once(2)
    guess = max(once(2) / 2, 1e-6)
    count = max(4, min(int(TIMED / guess) + 1, 4096))
    once(count)
    return statistics.median(once(count) for _ in range(repeats)) / count


# -- limits ------------------------------------------------------------------------------------------------


def limits(repeats: int, tiny: bool) -> dict[str, float]:
    """Bytes per second copied (read and written both counted) and read, and bf16 operations per second."""
    size = 2**22 if tiny else 2**29
    x = jnp.ones(size, jnp.bfloat16)
    copied = 2 * x.nbytes / seconds(lambda x: x * jnp.bfloat16(1.0078125), x, repeats)

    def read(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, total = carry  # the sum depends on the one before, so that the loop cannot read once for all
        return x, jnp.sum(x.astype(jnp.float32) * (1.0 + 1e-30 * total))

    was_read = x.nbytes / seconds(read, (x, jnp.float32(0)), repeats)
    side = 512 if tiny else 8192
    a = jnp.full((side, side), 1 / side, jnp.bfloat16)
    multiplied = 2 * side**3 / seconds(lambda b: a @ b, a, repeats)
    return {"copy": copied, "read": was_read, "matrix": multiplied}


# -- workloads ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Pages stand in no order. starts, counts, offsets: of a prefill."""

    q: jax.Array
    kv: jax.Array
    pool: jax.Array
    table: jax.Array
    lengths: jax.Array
    counts: jax.Array


def inputs(work: Workload) -> Inputs:
    pages = -(-work.length // PAGE)
    rng = np.random.default_rng(0)
    table = rng.permutation(work.rows * pages).reshape(work.rows, pages).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = work.rows * (work.tokens or 1)
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    return Inputs(
        q=draw(keys[0], (tokens, HEADS, SIZE)),
        kv=draw(keys[1], (tokens, WIDTH)),
        pool=jax.jit(draw, static_argnums=1)(keys[2], (1, work.rows * pages, PAGE, WIDTH)),
        table=jnp.asarray(table),
        lengths=jnp.full(work.rows, work.length, jnp.int32),
        counts=jnp.full(work.rows, work.tokens, jnp.int32),
    )


Step = Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]


def ours(work: Workload, given: Inputs, implementation: str) -> tuple[Step, tuple[jax.Array, ...]]:
    """(q, pool) -> (output, pool), the new tokens' keys and values written each time."""

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, pool = carry
        layer, window = jnp.int32(0), jnp.int32(ALL)
        if work.tokens:
            starts = jnp.arange(work.rows, dtype=jnp.int32) * work.tokens
            offsets = given.lengths - given.counts
            return prefill_attention(
                q, given.kv, pool, layer, given.table, starts, given.counts, offsets, window,
                scale=SCALE, implementation=implementation,
            )  # fmt: skip
        return decode_attention(
            q, given.kv, pool, layer, given.table, given.lengths, window,
            scale=SCALE, implementation=implementation,
        )  # fmt: skip

    return step, (given.q, given.pool)


def written(work: Workload, given: Inputs) -> jax.Array:
    """The pool as it is once the new tokens are in it, for libraries that only read."""
    step, carry = ours(work, given, "xla")
    return jax.jit(step)(carry)[1]


def contiguous(work: Workload, pool: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [rows, length, K, H], taken out of the pages."""
    cached = pool[0, table].reshape(work.rows, -1, KV_HEADS, 2, SIZE)[:, : work.length]
    return cached[:, :, :, 0], cached[:, :, :, 1]


def cudnn(work: Workload, given: Inputs, pool: jax.Array, gather: bool) -> tuple[Step, tuple[jax.Array, ...]]:
    """cuDNN's attention over keys and values that lie together. gather: taken out of the pages each time."""

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(
            q.reshape(work.rows, -1, HEADS, SIZE), keys, values,
            scale=SCALE, is_causal=bool(work.tokens), implementation="cudnn",
        )  # fmt: skip
        return out.reshape(q.shape)

    if gather:
        return lambda carry: (attend(carry[0], *contiguous(work, carry[1], carry[2])), *carry[1:]), (
            given.q, pool, given.table,
        )  # fmt: skip
    keys, values = jax.jit(functools.partial(contiguous, work))(pool, given.table)
    return lambda carry: (attend(*carry), *carry[1:]), (given.q, keys, values)


def jax_ragged(work: Workload, given: Inputs, pool: jax.Array) -> tuple[Step, tuple[jax.Array, ...]]:
    """jax's in-tree ragged paged attention for TPU, over the same pages."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    per_row = work.tokens or 1
    ends = jnp.arange(work.rows + 1, dtype=jnp.int32) * per_row

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, pages = carry
        count = jnp.array([work.rows], jnp.int32)
        return ragged_paged_attention(
            q, pages, given.lengths, given.table, ends, count, sm_scale=SCALE
        ), pages

    return step, (given.q, pool[0].reshape(*pool.shape[1:3], 2 * KV_HEADS, SIZE))


def tokamax(work: Workload, given: Inputs, pool: jax.Array) -> tuple[Step, tuple[jax.Array, ...]]:
    """tokamax's attention over keys and values that lie together. Raises ImportError where it is missing."""
    library = importlib.import_module("tokamax")

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, keys, values = carry
        out = library.dot_product_attention(
            q.reshape(work.rows, -1, HEADS, SIZE), keys, values, scale=SCALE, is_causal=bool(work.tokens)
        )
        return out.reshape(q.shape), keys, values

    keys, values = jax.jit(functools.partial(contiguous, work))(pool, given.table)
    return step, (given.q, keys, values)


def contenders(work: Workload, given: Inputs, platform: str) -> dict[str, Callable[[], Any]]:
    """Name -> what makes its step and first carry. Ours comes first, XLA's second."""
    chip, pick = this_chip(), prefill_implementation if work.tokens else decode_implementation
    picked = pick(chip, given.q, given.pool, given.table)
    made: dict[str, Callable[[], Any]]
    made = {name: functools.partial(ours, work, given, name) for name in dict.fromkeys((picked, "xla"))}
    pool = written(work, given)
    if platform == "gpu":
        made["cudnn"] = functools.partial(cudnn, work, given, pool, False)
        made["gather + cudnn"] = functools.partial(cudnn, work, given, pool, True)
    if platform == "tpu":
        made["jax ragged"] = functools.partial(jax_ragged, work, given, pool)
    if platform != "cpu":
        made["tokamax"] = functools.partial(tokamax, work, given, pool)
    return made


def run(work: Workload, platform: str, reached: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    """A row for each contender; one that cannot run says why."""
    given = inputs(work)
    reference, first = ours(work, given, "xla")
    want = np.asarray(jax.jit(reference)(first)[0], np.float32)
    rows = []
    for name, make in contenders(work, given, platform).items():
        row: dict[str, Any] = {"workload": work.name, "implementation": name}
        rows.append(row)
        try:
            step, carry = make()
            out = np.asarray(jax.jit(step)(carry)[0], np.float32)
            row["error"] = float(np.abs(out - want).max() / np.abs(want).max())
            row["correct"] = row["error"] <= TOLERANCE
            row["seconds"] = seconds(step, carry, repeats)
        except Exception as error:  # another's kernel may refuse anything; ours failing is told and counted
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            continue
        row["bytes_per_s"] = work.bytes / row["seconds"]
        row["operations_per_s"] = work.operations / row["seconds"]
        limit = "matrix" if work.tokens else "copy"
        rate = row["operations_per_s"] if work.tokens else row["bytes_per_s"]
        row["share"], row["of"] = rate / reached[limit], limit
    return rows


def text(row: dict[str, Any]) -> str:
    head = f"{row['workload']:18} {row['implementation']:16}"
    if "failed" in row:
        return f"{head} did not run: {row['failed']}"
    wrong = "" if row["correct"] else f"  WRONG by {row['error']:.3g} of the largest value"
    return (
        f"{head} {row['seconds'] * 1e6:11.1f} µs  {row['bytes_per_s'] / 1e9:8.1f} GB/s  "
        f"{row['operations_per_s'] / 1e12:7.2f} Top/s  {row['share']:6.1%} of {row['of']}{wrong}"
    )


def commit() -> str | None:
    """Of the checkout, `+` behind it where files differ; None where there is none."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        name = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return name + ("+" if git(["git", "status", "--short", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="writes everything there")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    args = parser.parse_args()
    device, chip = jax.devices()[0], this_chip()
    tiny = chip.platform == "cpu"
    about = {
        "device": device.device_kind,
        "chip": chip.name,
        "jax": jax.__version__,
        "tokamax": version("tokamax"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "repeats": args.repeats,
    }
    print(json.dumps(about))
    if tiny:
        print("a CPU: tiny sizes, and figures that mean nothing")
    reached = limits(args.repeats, tiny)
    print(
        f"measured limits: copy {reached['copy'] / 1e9:.0f} GB/s, read {reached['read'] / 1e9:.0f} GB/s, "
        f"bf16 products {reached['matrix'] / 1e12:.2f} Top/s",
        flush=True,
    )
    rows = []
    for work in TINY if tiny else WORKLOADS:
        if args.only not in work.name:
            continue
        for row in run(work, chip.platform, reached, args.repeats):
            print(text(row), flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**about, "limits": reached, "rows": rows}, indent=1) + "\n")
    names = {"tpu", "mosaic_gpu", "xla"}
    bad = [row for row in rows if row["implementation"] in names and not row.get("correct")]
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
