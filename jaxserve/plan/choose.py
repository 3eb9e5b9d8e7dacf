"""Meshes compared by arithmetic: what fits on each, and how fast it can be at most.

A mesh is `data` replicas, each over its own devices, with a pool of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax

from jaxserve.build import MAX_FLAT_PAGES
from jaxserve.models.config import ModelConfig, context_limit
from jaxserve.models.decoder import Decoder
from jaxserve.models.meshes import check_mesh
from jaxserve.plan import roofline
from jaxserve.plan.chips import Chip
from jaxserve.plan.options import MOST_SLOTS, PlanOptions
from jaxserve.plan.roofline import Bound, Time
from jaxserve.plan.sizes import Sizes, sizes
from pallas_kernels.tpu_common import TABLE_LIMIT
from sharding import MeshShape, make_mesh, parse_mesh

POOL_SHARE = 0.9  # of what the weights leave, as the engine begins; programs and state get the rest


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A mesh and what it holds; bytes are on one device, slots and pages of one replica.

    limit: bytes that may be used. slots_bound: why there are no more slots. missing: bytes that there are too
    few of. reason: why it does not fit, or None.
    """

    mesh: MeshShape
    sizes: Sizes
    limit: int
    pages: int
    page_size: int
    slots: int
    max_model_len: int
    slots_bound: str = ""
    missing: int = 0
    reason: str | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def pool_bytes(self) -> int:
        return self.pages * self.sizes.page

    @property
    def state_bytes(self) -> int:
        """Beside the pool."""
        return self.sizes.slot * self.slots

    @property
    def needed(self) -> int:
        """What stays on a device between steps."""
        return self.sizes.weights + self.pool_bytes + self.state_bytes

    @property
    def pool_tokens(self) -> int:
        """Of all replicas."""
        return self.pages * self.page_size * self.mesh.data

    def context(self, slots: int) -> int:
        """Tokens that each of so many sequences can have, spread over the replicas."""
        each = -(-slots // self.mesh.data)
        return min(self.pages // each * self.page_size, self.max_model_len)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """How fast it can be at most with so many sequences in all replicas together. Seconds.

    first_token: of a prompt that comes while the other sequences draw. token: between two of one sequence.
    tokens_per_second: drawn, by all. with_prompts: likewise, counting the time for the prompts.
    """

    slots: int
    first_token: float
    first_token_bound: Bound
    token: float
    bound: Bound
    time: Time
    tokens_per_second: float
    with_prompts: float


def meshes(config: ModelConfig, chips: int, asked: str | None) -> list[MeshShape]:
    """Those of so many devices that the model's sizes divide by, or the one asked for.

    Raises ValueError for one that does not go with the model or the slice.
    """
    if asked is not None:
        shape = parse_mesh(asked)
        if shape.devices != chips:
            raise ValueError(f"--mesh {asked}: is for {shape.devices} chips; the slice has {chips}")
        check_mesh(config, dataclasses.replace(shape, data=1))
        return [shape]
    found = []
    for data in range(1, chips + 1):
        for expert in range(1, chips // data + 1):
            if chips % (data * expert):
                continue
            shape = MeshShape(data=data, tensor=chips // (data * expert), expert=expert)
            try:
                check_mesh(config, dataclasses.replace(shape, data=1))
            except ValueError:
                continue
            found.append(shape)
    return found  # one replica on each device is always among them


def candidate(
    model: Decoder, shape: MeshShape, devices: Sequence[jax.Device], limit: int, options: PlanOptions
) -> Candidate:
    """What the mesh holds. devices: at least those of one replica."""
    one = MeshShape(tensor=shape.tensor, expert=shape.expert)
    mesh = make_mesh(one, devices, kv_heads=model.config.num_kv_heads)
    size = sizes(model, mesh, options.page_size)
    page, longest = options.page_size, context_limit(model.config)
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"--max-model-len={options.max_model_len} is beyond the model's context of {longest} tokens"
        )
    if options.request_tokens > (options.max_model_len or longest):
        raise ValueError(
            f"--input-tokens={options.input_tokens} and --output-tokens={options.output_tokens} together are"
            f" beyond the context of {options.max_model_len or longest} tokens"
        )
    left = limit - size.weights
    fitting = min(max(int(left * POOL_SHARE), 0) // size.page, MAX_FLAT_PAGES // model.config.num_layers)
    request = -(-options.request_tokens // page)
    context = options.max_model_len or min(longest, max(fitting, request) * page)
    needed = -(-context // page) if options.max_model_len else request
    pages, reason, missing = max(fitting, needed), None, max(needed * size.page - left, 0)
    if left < 0:
        missing = -left
        reason = (
            f"the weights take {size.weights} bytes of each device and {limit} may be used:"
            f" {missing} are missing"
        )
    elif missing:
        reason = (
            f"{needed * page} tokens of KV cache take {needed * size.page} bytes of each device beside"
            f" {size.weights} of weights, and {limit} may be used: {missing} are missing"
        )
    slots, bound = _slots(options, pages // request, -(-context // page), devices[0].platform)
    return Candidate(shape, size, limit, pages, page, slots, context, bound, missing, reason)


def _slots(options: PlanOptions, requests: int, pages_per_slot: int, platform: str) -> tuple[int, str]:
    """(of a replica, why no more). requests: that the pool holds at their full length."""
    if options.max_slots is not None:
        return options.max_slots, "--max-slots"
    bounds = [(requests, "the pool"), (MOST_SLOTS, "this command, without --max-slots")]
    if platform == "tpu":  # page tables of all rows lie in scalar memory
        tables = TABLE_LIMIT // (4 * pages_per_slot)
        bounds.append((tables, "scalar memory for page tables: a lower --max-model-len has more"))
    slots, bound = min(bounds)
    return max(slots, 1), bound


def least_pages(found: Candidate, options: PlanOptions) -> int:
    """That a replica's pool must have: for one sequence of --max-model-len, or one request."""
    wanted = found.max_model_len if options.max_model_len else options.request_tokens
    return -(-wanted // found.page_size)


def with_pages(found: Candidate, pages: int, options: PlanOptions) -> Candidate:
    """With a smaller pool."""
    longest = min(found.max_model_len, pages * found.page_size)
    fewer = dataclasses.replace(found, pages=pages, max_model_len=longest)
    bound = "the pool" if full(fewer, options) < full(found, options) else found.slots_bound
    return dataclasses.replace(fewer, slots_bound=bound)


def full(found: Candidate, options: PlanOptions) -> int:
    """Requests that run together at their full length, in all replicas."""
    one = -(-options.request_tokens // found.page_size)
    return max(min(found.slots, found.pages // one), 1) * found.mesh.data


def point(found: Candidate, chip: Chip, options: PlanOptions, slots: int) -> Point:
    """With so many sequences, which share the replicas evenly; the fullest one counts."""
    part, data = found.sizes.part, found.mesh.data
    rows = -(-slots // data)
    context = options.mean_context
    time = roofline.decode(part, chip, rows, context)
    chunks = roofline.prefill(part, chip, options.input_tokens, options.engine().chunk_tokens)
    # a chunk and a token of each of the others take turns
    others = roofline.decode(part, chip, rows - 1, context) if rows > 1 else None
    waited = chunks + [others] * len(chunks) if others else chunks
    bound = functools.reduce(operator.add, waited).bound
    prompt = roofline.packed(part, chip, options.input_tokens, options.engine().chunk_tokens).seconds
    served = rows * prompt + options.output_tokens * time.seconds  # all of the fullest replica's
    return Point(
        slots=slots,
        first_token=sum(each.seconds for each in waited),
        first_token_bound=bound,
        token=time.seconds,
        bound=time.bound,
        time=time,
        tokens_per_second=slots / time.seconds,
        with_prompts=slots * options.output_tokens / served,
    )


def best(found: Sequence[Candidate], chip: Chip, options: PlanOptions) -> Candidate:
    """By the objective, of those that fit; where none does, the one that lacks least."""
    fitting = [one for one in found if one.fits]
    if not fitting:
        return min(found, key=lambda one: one.missing)
    if options.objective == "latency":
        return min(fitting, key=lambda one: point(one, chip, options, 1).token)
    return max(fitting, key=lambda one: point(one, chip, options, full(one, options)).with_prompts)
