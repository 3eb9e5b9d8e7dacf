"""The whole plan of one model on one slice, as plain data: what `jaxserve plan` prints and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import models
from jaxserve.build import FEWER, is_exhausted
from jaxserve.models.config import context_limit
from jaxserve.models.decoder import Decoder
from jaxserve.plan.chips import Chip, chips
from jaxserve.plan.choose import (
    Candidate,
    best,
    candidate,
    full,
    least_pages,
    meshes,
    point,
    with_pages,
)
from jaxserve.plan.compiled import Analysis, compile_for
from jaxserve.plan.options import PlanOptions
from jaxserve.plan.roofline import packed
from jaxserve.plan.sizes import parameters
from sharding.topology import Slice

SHOWN = (1, 8, 64)  # slots, beside as many as there are
PER_MILLION = 1e6 / 3600  # of a price per hour and a rate per second

Report = dict[str, Any]
Compile = Callable[[Decoder, Candidate], Analysis]


def examine(
    config: Mapping[str, Any],
    name: str,
    where: Slice,
    options: PlanOptions,
    devices: Sequence[jax.Device],
    compile: Compile | None = None,
    progress: Callable[[str], None] = lambda line: None,
    avoid: Sequence[str] = (),
    begun: Callable[[str], None] = lambda mesh: None,
) -> Report:
    """`config` is config.json's object, `devices` the slice's, as its compiler has them.

    Compiles nothing where arithmetic says already that it does not fit. compile: in place of the compiler.
    avoid: meshes that are not to be chosen. begun: hears which mesh is compiled for.
    Raises ValueError naming what is wrong with the config or the options, and where no mesh is left.
    """
    read = models.config_from_hf(config)
    dtype = (read.dtype or "float32") if options.dtype == "auto" else options.dtype
    model = Decoder(read, jnp.dtype(dtype))
    chip = chips()[where.chip]
    chip.rate(dtype)
    limit = int(chip.usable() * options.memory_fraction)
    found = [
        candidate(model, shape, devices, limit, options) for shape in meshes(read, where.chips, options.mesh)
    ]
    left = [one for one in found if str(one.mesh) not in avoid]
    if not left:
        raise ValueError(f"{name} on {where}: no mesh is left beside {'; '.join(avoid)}")
    chosen = best(left, chip, options)
    report: Report = {
        "fits": chosen.fits,
        "reason": chosen.reason,
        "missing_bytes": chosen.missing,
        "model": {
            "name": name,
            "model_type": read.model_type,
            "parameters": parameters(model),
            "dtype": dtype,
            "context": context_limit(read),
        },
        "chips": {
            "slice": str(where),
            "chip": chip.name,
            "count": where.chips,
            "form": where.form,
            "memory": chip.memory,
            "taken_by_runtime": chip.usable(),
            "limit": limit,
        },
        "options": dataclasses.asdict(options),
        "jax": jax.__version__,
        "meshes": [_mesh_row(one, chip, options) for one in found],
        "passed_over": [],
        "compiled": None,
    }
    temporaries = None
    if chosen.fits:
        begun(str(chosen.mesh))
        progress(f"{name} on {where}: compiling for mesh {chosen.mesh}, {chosen.slots} slots a replica")
        compile = compile or (lambda model, chosen: compile_for(model, chosen, devices, options, progress))
        try:
            chosen, analysis = _compile(compile, model, chosen, options, progress)
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            refusal = f"the compiler: {str(error).splitlines()[0]}"
            report |= {"fits": False, "reason": refusal, "missing_bytes": None}
        else:
            report["compiled"] = _compiled(analysis)
            temporaries = analysis.needed - chosen.needed
            chosen = with_what_is_left(chosen, temporaries, options)
            report |= {"fits": chosen.fits, "reason": chosen.reason, "missing_bytes": chosen.missing}
            report["meshes"] = [
                _mesh_row(chosen if one.mesh == chosen.mesh else one, chip, options) for one in found
            ]
    report["mesh"] = dataclasses.asdict(chosen.mesh)
    report["bytes"] = _bytes(chosen, temporaries)
    if report["fits"]:
        report |= _what_it_holds(chosen, options) | _how_fast(chosen, chip, options)
    return report


def _compile(
    compile: Compile,
    model: Decoder,
    chosen: Candidate,
    options: PlanOptions,
    progress: Callable[[str], None],
) -> tuple[Candidate, Analysis]:
    """What was compiled, and for which pool: as the engine does, a smaller one where the compiler itself
    finds no room. Raises its error where the smallest that is wanted has none."""
    while True:
        try:
            return chosen, compile(model, chosen)
        except jax.errors.JaxRuntimeError as error:
            pages = int(chosen.pages * FEWER)
            if not is_exhausted(error) or pages < least_pages(chosen, options):
                raise
            progress(f"the compiler finds no room beside {chosen.pages} pages; with {pages} now")
            chosen = with_pages(chosen, pages, options)


def with_what_is_left(chosen: Candidate, temporaries: int, options: PlanOptions) -> Candidate:
    """With as many pages as the compiled programs' own memory leaves room for, if there were too many."""
    over = chosen.needed + temporaries - chosen.limit
    if over <= 0:
        return chosen
    pages, least = chosen.pages - -(-over // chosen.sizes.page), least_pages(chosen, options)
    if pages >= least:
        return with_pages(chosen, pages, options)
    missing = (least - pages) * chosen.sizes.page
    reason = (
        f"weights, state, programs and {least * chosen.page_size} tokens of KV cache take"
        f" {chosen.limit + missing} bytes of each device and {chosen.limit} may be used:"
        f" {missing} are missing"
    )
    return dataclasses.replace(chosen, reason=reason, missing=missing)


def _bytes(chosen: Candidate, temporaries: int | None) -> Report:
    """On one device. Without a compiled program temporaries are not known."""
    return {
        "weights": chosen.sizes.weights,
        "pool": chosen.pool_bytes,
        "page": chosen.sizes.page,
        "state": chosen.state_bytes,
        "temporaries": temporaries,
        "needed": None if temporaries is None else chosen.needed + temporaries,
        "limit": chosen.limit,
    }


def _compiled(analysis: Analysis) -> Report:
    rows = {}
    for one in analysis.programs:
        row = dataclasses.asdict(one)
        rows[row.pop("kind")] = row | {"seconds": round(one.seconds, 2)}
    return rows | {"kernels": analysis.kernels}


def _mesh_row(one: Candidate, chip: Chip, options: PlanOptions) -> Report:
    row: Report = {
        "mesh": str(one.mesh),
        "fits": one.fits,
        "reason": one.reason,
        "weights": one.sizes.weights,
        "pool_tokens": one.pool_tokens if one.fits else 0,
    }
    if one.fits:
        alone, all_slots = (point(one, chip, options, slots) for slots in (1, full(one, options)))
        row |= {
            "slots": all_slots.slots,
            "token_alone": alone.token,
            "token_full": all_slots.token,
            "tokens_per_second": all_slots.tokens_per_second,
            "with_prompts": all_slots.with_prompts,
        }
    return row


def _what_it_holds(chosen: Candidate, options: PlanOptions) -> Report:
    most = full(chosen, options)
    shown = sorted({*(slots for slots in SHOWN if slots <= most), most})
    return {
        "max_model_len": chosen.max_model_len,
        "pool": {
            "pages": chosen.pages,
            "page_size": chosen.page_size,
            "tokens": chosen.pool_tokens,
            "replicas": chosen.mesh.data,
        },
        "slots": {"of_a_replica": chosen.slots, "full": most, "bound": chosen.slots_bound},
        "contexts": [{"slots": slots, "tokens": chosen.context(slots)} for slots in shown],
    }


def _how_fast(chosen: Candidate, chip: Chip, options: PlanOptions) -> Report:
    """`points`: slots in powers of two, those that are shown and all."""
    most = full(chosen, options)
    doubled = {2**i for i in range(most.bit_length())}
    rows = []
    for slots in sorted({*(one for one in {*SHOWN, *doubled} if one <= most), most}):
        found = point(chosen, chip, options, slots)
        rows.append(
            {
                "slots": slots,
                "shown": slots in SHOWN or slots == most,
                **{key: value for key, value in dataclasses.asdict(found).items() if key != "slots"},
                "cost_per_million_output": _cost(chosen, options, found.tokens_per_second),
            }
        )
    prompt = packed(chosen.sizes.part, chip, options.input_tokens, options.engine().chunk_tokens)
    rate = chosen.mesh.data * options.input_tokens / prompt.seconds
    return {
        "points": rows,
        "prefill": {
            "tokens_per_second": rate,
            "bound": prompt.bound,
            "cost_per_million_input": _cost(chosen, options, rate),
        },
    }


def _cost(chosen: Candidate, options: PlanOptions, tokens_per_second: float) -> float | None:
    """Of a million tokens, if the slice does nothing else."""
    if options.price is None:
        return None
    return options.price * chosen.mesh.devices * PER_MILLION / tokens_per_second
