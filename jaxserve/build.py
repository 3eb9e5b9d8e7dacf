"""From options to a running engine: the one place that wires everything.

    folder -> config -> mesh -> declared weights -> programs compiled -> pool sized -> weights placed
    -> warm-up

The pool's size follows from the memory that is there: the largest programs are compiled first, their own
memory analysis says what a step needs beside weights and pages, and the pages get the rest.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import Mesh

from checkpoints import huggingface, remote
from checkpoints.embedded import MODEL_DIR
from jaxserve import __version__, models, tuned
from jaxserve.config import MOST_QUEUED, MOST_QUEUED_TOKENS, EngineOptions
from jaxserve.disaggregated import MOVES_AHEAD, Disaggregated, PromptReplicas
from jaxserve.engine.buckets import (
    PAGES_MOVED,
    decode_buckets,
    prefill_buckets,
    register_moves,
    register_programs,
)
from jaxserve.engine.engine import Engine
from jaxserve.engine.follower import LeadingRunner, follow
from jaxserve.engine.programs import Programs, device_bytes
from jaxserve.engine.runner import Runner
from jaxserve.engine.state import EngineState, StateShape, abstract_state, new_state, page_bytes
from jaxserve.engine.step import Steps
from jaxserve.generation_defaults import unused_sampling_fields
from jaxserve.memory import memory_limit
from jaxserve.models.config import ModelConfig, context_limit
from jaxserve.models.decoder import Decoder, Layout, Params
from jaxserve.models.meshes import check_mesh, choose_mesh
from jaxserve.pooling import pooling_of
from jaxserve.protocols import EngineLike
from jaxserve.replicas import Replicas
from jaxserve.response_cache import CachingEngine, ResponseCache, cache_file
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.types import Limits, SamplingParams
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.warm_up import warm_up
from jaxserve.weights import (
    Checkpoint,
    abstract_params,
    copy_params,
    dummy_params,
    layout_for,
    load_params,
    model_digest,
    open_weights,
)
from sharding import MeshShape, make_mesh, parse_mesh, parts
from sharding.channel import ChannelError
from sharding.distributed import Group

Progress = Callable[[str], None]
EMBEDDED_NAME = "jaxserve-embedded"
FEWER = 0.85  # of the pages, where the compiler itself says that there are too many
MAX_FLAT_PAGES = 2**31 - 2  # layer x pages + page is an int32 index


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model's folder, read as far as the headers: everything but the weights."""

    name: str
    folder: Path
    config: ModelConfig
    dtype: np.dtype
    max_model_len: int


def model_name(model: str | None) -> str:
    """The last part of the folder, URL or hub id."""
    return (
        EMBEDDED_NAME
        if model is None
        else Path(model).resolve().name
        if Path(model).is_dir()
        else model.rstrip("/").rsplit("/")[-1]
    )


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The folder of a local path, an fsspec URL or a hub id; CheckpointError where there is none."""
    if remote.is_url(model):
        return remote.fetch(model, weights=weights)
    return huggingface.resolve_model(model, weights=weights)


def read_model(model: str | None, options: EngineOptions) -> Loaded:
    """Raises ValueError (ConfigError, CheckpointError among them) naming what does not fit."""
    if model is None:
        folder = MODEL_DIR
    else:
        folder = resolve_model(model, weights=options.load_format != "dummy")
    config = models.config_from_hf(huggingface.read_config(folder))
    dtype = (config.dtype or "float32") if options.dtype == "auto" else options.dtype
    longest = context_limit(config)
    length = longest if options.max_model_len is None else options.max_model_len
    if length > longest:
        raise ValueError(
            f"--max-model-len={length} is beyond the model's context of {longest} tokens"
            f" (rope {config.rope.kind}, max_position_embeddings={config.max_position})"
        )
    return Loaded(model_name(model), folder, config, np.dtype(jnp.dtype(dtype)), length)


@dataclasses.dataclass(frozen=True)
class Part:
    """One engine among those of this process.

    devices: that it runs on; None: any that there are. here: engines and processes on this host, which share
    its memory. prompts_only: it draws nothing. full_only: it has the largest decode program alone, for being
    measured with all slots busy. moves: it gives its pages to others or takes theirs.
    params: weights that are on devices already; they are copied. held: bytes on each device that are not free
    because of them, where what may be used follows from what is free.
    """

    devices: tuple[jax.Device, ...] | None = None
    here: int = 1
    prompts_only: bool = False
    full_only: bool = False
    moves: bool = False
    params: Params | None = None
    held: int = 0


ALONE = Part()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will run, before any weight is loaded. Bytes are on one device."""

    loaded: Loaded
    mesh: Mesh
    layout: Layout
    model: Decoder
    steps: Steps
    shape: StateShape
    prefill_rows: dict[int, int]
    programs: Programs
    page_bytes: int
    limit: int
    checkpoint: Checkpoint | None  # None: random weights
    tokenizer: Tokenizer | None
    sampling_defaults: dict[str, float | int]


def plan_engine(
    model: str | None,
    options: EngineOptions,
    progress: Progress,
    group: Group | None = None,
    part: Part = ALONE,
) -> Plan:
    """Reads all of the model but its weights, compiles the largest programs, sizes the pool by them; in a
    group each process does, and all come to the same.

    What is wrong with the folder shows here, before anything is compiled: missing or mis-shaped tensors,
    truncated files. Raises ValueError naming what does not fit: a key, or the flag and the bytes.
    """
    asked = None if options.mesh is None else parse_mesh(options.mesh)
    if asked and asked.data > 1:
        raise ValueError(f"--mesh {options.mesh}: one engine is one replica; data must be 1")
    loaded = read_model(model, options)
    mesh = _mesh(loaded.config, asked, progress, part.devices)
    device = mesh.devices.flat[0]
    measured_alike = group is None and not part.moves
    options = with_sizes(options, loaded, mesh, progress, measured_alike=measured_alike)
    if group is None:
        limit = memory_limit(mesh, options.memory_fraction, part.here)
        limit += int(options.memory_fraction * part.held)
    else:
        limit = _agree(group, loaded, options, mesh)
    layout = layout_for(device.platform)
    decoder = Decoder(loaded.config, jnp.dtype(loaded.dtype))
    checkpoint = None if options.load_format == "dummy" else open_weights(decoder, loaded.folder)
    tokenizer = _tokenizer(loaded.folder, progress)
    defaults = sampling_defaults(loaded.folder)
    if unused := unused_sampling_fields(loaded.folder):
        progress(f"warning: generation_config.json sets {', '.join(unused)}, which jaxserve does not apply")
    params = abstract_params(decoder, mesh, layout)
    pages_per_slot = -(-loaded.max_model_len // options.page_tokens)
    steps = Steps(decoder, mesh, pages_per_slot)
    prefill_rows = prefill_buckets(options.chunk_tokens, options.slots)
    decode_rows = decode_buckets(options.slots)
    if options.reproducible:  # one program of each kind: a row's bits may depend on the bucket
        prefill_rows = dict([max(prefill_rows.items())])
    if options.reproducible or part.full_only:
        decode_rows = decode_rows[-1:]
    if part.prompts_only:
        decode_rows = []
    max_steps = multi_step(options)
    each = page_bytes(loaded.config, options.page_tokens, loaded.dtype) // parts(mesh, "kv_heads")
    progress(
        f"model {loaded.name}: {_describe(decoder)}, context {loaded.max_model_len},"
        f" {device.device_kind} x {mesh.size}"
    )
    kernels = steps.kernels(options.page_tokens, options.slots, max(prefill_rows.values()))
    progress("; ".join(f"{kernel}: {implementation}" for kernel, implementation in kernels.items()))
    if part.moves:
        limit -= (MOVES_AHEAD + 2) * PAGES_MOVED * each  # blocks on their way: see `disaggregated`

    def programs_for(pages: int) -> tuple[StateShape, Programs]:
        state = StateShape(options.slots, pages, options.page_tokens, pages_per_slot)
        programs = register_programs(steps, params, state, prefill_rows, decode_rows, max_steps)
        programs.compiler_options = compiler_options(device.platform, reproducible=options.reproducible)
        if part.moves:
            register_moves(programs, steps, state)
        return state, programs

    fixed = device_bytes(params)
    pages = options.kv_pages or max(int((limit - fixed) * 0.9) // each, pages_per_slot)
    if options.kv_pages is None and (device.platform == "cpu" or not options.prefix_cache):
        # enough for every slot at full length; the prefix cache has no claim on the host's own memory
        pages = min(pages, options.slots * pages_per_slot)
    if pages < pages_per_slot:
        raise ValueError(
            f"--kv-pages={pages} of --page-size={options.page_tokens} hold"
            f" {pages * options.page_tokens} tokens, less than one sequence of"
            f" --max-model-len={loaded.max_model_len}; raise the one or lower the other"
        )
    pages = min(pages, MAX_FLAT_PAGES // loaded.config.num_layers) if options.kv_pages is None else pages
    if pages * each + fixed > limit:  # no need to compile anything to see that
        raise ValueError(_too_small(options, pages, pages_per_slot, each, fixed, limit))
    while True:
        state, programs = programs_for(pages)
        try:
            programs.compile(programs.largest(), threads=os.cpu_count() or 1, progress=progress)
            break
        except jax.errors.JaxRuntimeError as error:
            fewer = int(pages * FEWER)
            if not is_exhausted(error) or options.kv_pages is not None or fewer < pages_per_slot:
                raise
            progress(f"the compiler finds no room beside {pages} pages; with {fewer} now")
            pages = fewer
    if (needed := programs.needed()) > limit:
        other = needed - pages * each
        fitting = (limit - other) // each
        if options.kv_pages is not None or fitting < pages_per_slot:
            raise ValueError(_too_small(options, pages, pages_per_slot, each, other, limit))
        pages = fitting
        state, programs = programs_for(pages)
    if group is not None:
        group.agree({"the number of pages": pages})
    return Plan(
        loaded=loaded,
        mesh=mesh,
        layout=layout,
        model=decoder,
        steps=steps,
        shape=state,
        prefill_rows=prefill_rows,
        programs=programs,
        page_bytes=each,
        limit=limit,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        sampling_defaults=defaults,
    )


def with_sizes(
    options: EngineOptions, loaded: Loaded, mesh: Mesh, progress: Progress, *, measured_alike: bool
) -> EngineOptions:
    """The options with their slots, page and chunk size said: as given, else as `jaxserve tune` saved them
    for this model and machine, else the defaults.

    Saved ones are not used where bits depend on them (`--reproducible`), nor, unless `measured_alike`, where
    the engine is not what was measured: in a group of processes, or beside prefill replicas. Nor is the page
    size where `--kv-pages` counts pages.
    """
    open_ = [name for name in tuned.VALUES if getattr(options, name) is None]
    if options.kv_pages is not None and "page_size" in open_:
        open_.remove("page_size")
    values: dict[str, int] = {}
    if options.tuned and open_ and measured_alike:
        found = tuned.read(tuned_for(loaded, mesh), options.objective, progress)
        if found is not None:
            values = {name: found.values[name] for name in open_}
            flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
            if options.reproducible:
                progress(f"--reproducible: {flags} of {found.file} are not used; as flags they are")
                values = {}
            else:
                progress(
                    f"{flags}: from `jaxserve tune` of {found.date}, {found.file}; --no-tuned leaves them out"
                )
    return dataclasses.replace(
        options,
        max_slots=values.get("max_slots", options.slots),
        page_size=values.get("page_size", options.page_tokens),
        prefill_chunk=values.get("prefill_chunk", options.chunk_tokens),
    )


def tuned_for(loaded: Loaded, mesh: Mesh) -> dict[str, Any]:
    """All that what `jaxserve tune` measures depends on, beside the sizes that it tries."""
    device = mesh.devices.flat[0]
    return {
        "config.json": tuned.digest(huggingface.read_config(loaded.folder)),
        "dtype": str(loaded.dtype),
        "max_model_len": loaded.max_model_len,
        "device": tuned.processor() if device.platform == "cpu" else device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jaxserve": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
    }


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a compiler found that a program has no room on the device."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _agree(group: Group, loaded: Loaded, options: EngineOptions, mesh: Mesh) -> int:
    """The least that any process may use of a device, in bytes. Raises ValueError where a process has no part
    in the mesh, GroupError where the processes were not started alike."""
    group.agree(
        {
            "jaxserve": __version__,
            "jax": f"{jax.__version__} with jaxlib {jaxlib.version.__version__}",
            "config.json": repr(loaded.config),
            **{f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(options).items()},
        }
    )
    if mesh.size < jax.device_count():
        raise ValueError(
            f"--mesh has {mesh.size} devices; the {group.place.processes} processes have"
            f" {jax.device_count()}, and each of them must be used"
        )
    return min(group.exchange(memory_limit(mesh, options.memory_fraction, group.processes_here())))


def _compile(plan: Plan, progress: Progress) -> None:
    """Every program. Raises ValueError if, all told, they need more than there is."""
    plan.programs.compile(threads=os.cpu_count() or 1, progress=progress)
    if (needed := plan.programs.needed()) > plan.limit:
        raise ValueError(
            f"weights, state and programs need {needed} bytes on each device; {plan.limit} may be used."
            " Lower --max-slots, --prefill-chunk or --kv-pages, or raise --memory-fraction"
        )


def _too_small(
    options: EngineOptions, pages: int, pages_per_slot: int, each: int, other: int, limit: int
) -> str:
    need = pages if options.kv_pages is not None else pages_per_slot
    flag = (
        f"--kv-pages={options.kv_pages}"
        if options.kv_pages is not None
        else "one sequence of --max-model-len"
    )
    return (
        f"{flag} needs {need} pages of {each} bytes = {need * each} bytes beside {other} bytes of weights,"
        f" state and programs; {limit} bytes may be used. Lower --max-model-len, --max-slots,"
        f" --prefill-chunk or --kv-pages, or raise --memory-fraction={options.memory_fraction}"
    )


def _mesh(
    config: ModelConfig, asked: MeshShape | None, progress: Progress, devices: Sequence[jax.Device] | None
) -> Mesh:
    """As asked for; or over as many devices as the model's sizes divide by, but one where they are a single
    CPU's. Raises ValueError for one that does not fit the model or the devices."""
    devices = jax.devices() if devices is None else devices
    shape = asked
    if shape is None:
        alone = devices[0].platform == "cpu" and jax.process_count() == 1
        shape = MeshShape() if alone else choose_mesh(config, len(devices))
        if shape.devices > 1 or len(devices) > 1:
            progress(f"--mesh {shape}: chosen for {len(devices)} device(s)")
    check_mesh(config, shape)
    mesh = make_mesh(shape, devices, kv_heads=config.num_kv_heads)
    if (held := shape.replica // parts(mesh, "kv_heads")) > 1:
        progress(
            f"each of the model's {config.num_kv_heads} key/value heads is held by {held} devices, its pages"
            " too: more devices divide the rest, and the pool no further"
        )
    return mesh


def _describe(model: Decoder) -> str:
    layers = model.config.num_layers
    count = sum(int(np.prod(w.shape)) * (layers if w.per_layer else 1) for w in model.weights)
    return f"{model.config.model_type} of {count / 1e6:.1f} M parameters in {model.dtype}"


# -- the engine ------------------------------------------------------------------------------------------


def _load(
    model: str | None, options: EngineOptions, progress: Progress, group: Group | None, part: Part = ALONE
) -> tuple[Plan, Params, EngineState]:
    """What a runner takes: everything compiled, the weights in place, an empty pool."""
    enable_compilation_cache(progress)
    plan = plan_engine(model, options, progress, group, part)
    _compile(plan, progress)
    compiled = time.perf_counter()
    weights = device_bytes(abstract_params(plan.model, plan.mesh, plan.layout))
    progress(f"placing {weights / 1e6:.0f} MB of weights on each of {plan.mesh.size} device(s)")
    if part.params is not None:
        params = copy_params(part.params, plan.model, plan.mesh, plan.layout)
    elif plan.checkpoint is None:
        params = dummy_params(plan.model, plan.mesh, plan.layout, options.seed)
    else:
        params = load_params(plan.model, plan.checkpoint, plan.mesh, plan.layout)
    jax.block_until_ready(params)
    progress(f"weights in place after {time.perf_counter() - compiled:.1f} s")
    state = new_state(abstract_state(plan.loaded.config, plan.shape, plan.loaded.dtype, plan.mesh))
    return plan, params, state


def build_engine(
    model: str | None,
    options: EngineOptions,
    *,
    progress: Progress = lambda line: None,
    group: Group | None = None,
    part: Part = ALONE,
) -> Engine:
    """An engine that is warm: whatever it will run is compiled. group: this process leads it.

    Raises ValueError for what cannot be served, GroupError and ChannelError where the group is not whole.
    """
    begin = time.perf_counter()
    plan, params, state = _load(model, options, progress, group, part)
    if group is None:
        runner = Runner(plan.programs, params, state)
    else:
        runner = LeadingRunner(plan.programs, params, state, group.channel)
    tokenizer, shape, config = plan.tokenizer, plan.shape, plan.loaded.config
    pooling, warning = pooling_of(plan.loaded.folder)
    if warning is not None:
        progress(f"warning: {warning}")
    engine = Engine(
        limits=Limits(
            vocab_size=config.vocab_size,
            max_model_len=plan.loaded.max_model_len,
            pool_tokens=shape.num_pages * shape.page_size,
            eos_token_ids=() if tokenizer is None else tuple(tokenizer.eos_token_ids),
            sampling_defaults=plan.sampling_defaults,
        ),
        tokenizer=tokenizer,
        runner=runner,
        scheduler=Scheduler(
            max_slots=shape.max_slots,
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            pages_per_slot=shape.pages_per_slot,
            prefill_chunk=max(plan.prefill_rows),
            max_prefill_rows=max(plan.prefill_rows.values()),
            prefix_cache=options.prefix_cache,
            cache_generated=not options.reproducible,
            replay=options.reproducible,
            multi_step=multi_step(options),
            overcommit=options.overcommit,
        ),
        prefill_rows=plan.prefill_rows,
        seed=options.seed,
        max_queued=options.max_queued,
        max_queued_tokens=options.max_queued_tokens or 64 * shape.num_pages * shape.page_size,
        step_timeout=options.step_timeout,
        choose_steps=options.multi_step is None,
        facts={
            "model": plan.loaded.name,
            "dtype": str(plan.loaded.dtype),
            "slots": shape.max_slots,
            "pages_total": shape.num_pages,
            "page_size": shape.page_size,
            "page_bytes": plan.page_bytes,
            "prefill_chunk": max(plan.prefill_rows),
            "max_model_len": plan.loaded.max_model_len,
            "embedding_size": plan.loaded.config.hidden_size,
            "embedding_pooling": str(pooling),
        },
    )
    if group is not None:
        group.on_failure(lambda reason: engine.fail(ChannelError(reason)))
    speed = warm_up(engine)
    if group is not None:
        group.channel.watch_closely()  # now that the others have loaded too
    engine.facts["chunk_seconds"] = speed.chunk
    if speed.step is not None:
        engine.facts["warmup_tokens_per_second"] = speed.slots / speed.step
        engine.facts["step_seconds"] = speed.step
    seconds = time.perf_counter() - begin
    engine.facts["startup_seconds"] = seconds
    progress(speed.describe(options.objective))
    progress(f"warm after {seconds:.1f} s")
    return engine


def run_follower(
    model: str | None, options: EngineOptions, group: Group, *, progress: Progress = lambda line: None
) -> None:
    """What any process but the first does: the same programs, until process 0 closes the group."""
    plan, params, state = _load(model, options, progress, group)
    progress("ready to follow process 0")
    follow(Runner(plan.programs, params, state), group.channel)


def build_serving(
    model: str | None,
    options: EngineOptions,
    *,
    progress: Progress = lambda line: None,
    group: Group | None = None,
) -> EngineLike:
    """What serves: a warm engine, or several behind one queue, with `--response-cache` behind the answers
    that they gave before. Raises as `build_engine`."""
    replicas = 1 if options.mesh is None else parse_mesh(options.mesh).data
    engine: Engine | Replicas
    if replicas == 1 and not options.prefill_replicas:
        engine = build_engine(model, options, progress=progress, group=group)
    elif group is None:
        engine = build_replicas(model, options, progress)
    else:
        raise ValueError(
            f"--mesh {options.mesh} --prefill-replicas={options.prefill_replicas}: over several processes"
            " data must be 1, and prompts are computed where tokens are drawn; start a group for each replica"
        )
    if not options.response_cache:
        return engine
    folder = read_model(model, options).folder
    one = engine.engines[0] if isinstance(engine, Replicas) else engine
    engine.facts["fingerprint"] = fingerprint(folder, _as_run(options, one.facts), one.facts["dtype"])
    return CachingEngine(engine, ResponseCache(cache_file(), options.response_cache * 2**20, progress))


def _replicas(options: EngineOptions) -> MeshShape:
    """The mesh of several engines. Raises ValueError where they cannot be."""
    shape = MeshShape() if options.mesh is None else parse_mesh(options.mesh)
    if options.prefill_replicas and not options.prefix_cache:
        raise ValueError("--prefill-replicas needs the prefix cache, through which the pages arrive")
    needed, there = (shape.data + options.prefill_replicas) * shape.replica, len(jax.devices())
    if needed > there:
        raise ValueError(
            f"{shape.data} replicas (--mesh data) and --prefill-replicas={options.prefill_replicas} on"
            f" {shape.replica} devices each need {needed}; there are {there}"
        )
    return shape


def build_replicas(model: str | None, options: EngineOptions, progress: Progress) -> Replicas:
    """An engine for each replica along the mesh's data axis, each on its own devices, and `prefill_replicas`
    more that only compute prompts; behind one queue. Raises ValueError where the devices do not suffice."""
    shape = _replicas(options)
    count, each, devices = shape.data + options.prefill_replicas, shape.replica, jax.devices()
    own = dataclasses.replace(
        options,
        mesh=str(dataclasses.replace(shape, data=1)),
        max_queued=MOST_QUEUED,  # the one queue says who waits, and who is refused
        max_queued_tokens=MOST_QUEUED_TOKENS,
    )

    def build(number: int, params: Params | None = None) -> Engine:
        part = Part(
            devices=tuple(devices[number * each : (number + 1) * each]),
            here=count,
            prompts_only=number >= shape.data,
            moves=options.prefill_replicas > 0,
            params=params,
        )
        name = f"replica {number}" if number < shape.data else f"prompts {number - shape.data}"
        return build_engine(model, own, progress=lambda line: progress(f"{name}: {line}"), part=part)

    first = build(0)
    own = _as_run(own, first.facts)  # all alike
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        others = pool.map(lambda number: build(number, first.params), range(1, count))
        engines = [first, *others]
    decoding: list[EngineLike] = list(engines[: shape.data])
    if options.prefill_replicas:
        prompts = PromptReplicas(engines[shape.data :])
        decoding = [Disaggregated(engine, prompts) for engine in engines[: shape.data]]
    pages = sum(engine.facts["pages_total"] for engine in engines[: shape.data])
    return Replicas(
        decoding,
        max_queued=options.max_queued,
        max_queued_tokens=options.max_queued_tokens or 64 * pages * first.facts["page_size"],
    )


def _as_run(options: EngineOptions, facts: Mapping[str, Any]) -> EngineOptions:
    """The options with the sizes that a running engine has."""
    return dataclasses.replace(
        options,
        max_slots=facts["slots"],
        page_size=facts["page_size"],
        prefill_chunk=facts["prefill_chunk"],
    )


def fingerprint(folder: Path, options: EngineOptions, dtype: str) -> str:
    """All that decides an answer beside the request: two engines of the same one give the same."""
    dummy = options.load_format == "dummy"
    model = (model_digest(folder, weights=not dummy), options.seed if dummy else None, dtype)
    versions = (__version__, jax.__version__, jaxlib.version.__version__)
    where = (jax.devices()[0].device_kind, options.mesh or len(jax.devices()), options.prefill_replicas)
    shapes = (options.reproducible, options.chunk_tokens, options.slots, options.page_tokens)
    return repr((model, versions, where, shapes, multi_step(options)))


def compiler_options(platform: str, *, reproducible: bool) -> dict[str, bool | int]:
    """XLA's. On a GPU it times candidates and may choose others at the next start; not if reproducible: then
    products go to cuBLAS's own choice, since a Triton one without a timing has no default."""
    if reproducible and platform in ("gpu", "cuda", "rocm"):
        return {
            "xla_gpu_deterministic_ops": True,
            "xla_gpu_autotune_level": 0,
            "xla_gpu_enable_triton_gemm": False,
        }
    return {}


def multi_step(options: EngineOptions) -> int:
    """Tokens per dispatch at most. Where nobody said, the engine uses them while the host is what is slow."""
    if options.multi_step is not None:
        return options.multi_step
    return 4 if options.objective == "throughput" else 1


def sampling_defaults(folder: Path) -> dict[str, float | int]:
    """What `generation_config.json` says of sampling, checked; empty where there is none.

    As in vLLM, `do_sample` is not looked at: a request that wants greedy says temperature 0.
    Raises ValueError naming the file and the field.
    """
    config = huggingface.read_json(folder, "generation_config.json", required=False)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: config[name] for name in names if config.get(name) is not None}
    try:
        SamplingParams(**chosen)
    except ValueError as error:
        raise ValueError(f"{folder / 'generation_config.json'}: {error}") from error
    return chosen


def _tokenizer(folder: Path, progress: Progress) -> Tokenizer | None:
    """None where the folder has none: then prompts are token ids, and replies have no text."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_folder(folder)
    progress(f"warning: {folder} has no tokenizer.json; prompts must be token ids, and replies have no text")
    return None


def dry_run(model: str | None, options: EngineOptions, progress: Progress = lambda line: None) -> str:
    """The programs, the pool and what fits, without loading a weight; ValueError if it does not fit."""
    enable_compilation_cache(progress)
    asked = None if options.mesh is None else parse_mesh(options.mesh)
    replicas, others = 1 if asked is None else asked.data, options.prefill_replicas
    if replicas > 1 or others:
        asked = _replicas(options)
    if asked is not None:
        options = dataclasses.replace(options, mesh=str(dataclasses.replace(asked, data=1)))
    plan = plan_engine(model, options, progress, part=Part(here=replicas + others, moves=others > 0))
    _compile(plan, progress)
    shape = plan.shape
    lines = []
    if replicas > 1 or others:
        lines.append(
            f"{replicas} replicas on {plan.mesh.size} device(s) each, and {others} more that only compute"
            " prompts; of one of them:"
        )
    lines += [f"{'program':<24}{'arguments':>16}{'temporary':>16}{'peak':>16}  bytes on one device"]
    for key in plan.programs.keys():
        memory = plan.programs.memory(key)
        lines.append(
            f"{key[0] + ' ' + str(key[1]):<24}{memory.arguments:>16}{memory.temporary:>16}{memory.peak:>16}"
        )
    needed = plan.programs.needed()
    tokens = shape.num_pages * shape.page_size
    lines += [
        f"pool: {shape.num_pages} pages of {shape.page_size} tokens = {tokens} tokens,"
        f" {shape.num_pages * plan.page_bytes} bytes on each of {plan.mesh.size} device(s)",
        f"slots: {shape.max_slots}; sequences of {plan.loaded.max_model_len} tokens that fit together:"
        f" {min(shape.max_slots, shape.num_pages // shape.pages_per_slot)}",
        f"memory: {needed} of {plan.limit} bytes ({needed / plan.limit:.1%}) -> fits",
    ]
    return "\n".join(lines)


def enable_compilation_cache(progress: Progress) -> None:
    """JAX's persistent cache, for every program however small. An unwritable folder is a warning."""
    folder = Path(
        os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "xla"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        progress(
            f"warning: no compilation cache, {folder} cannot be written ({error.strerror});"
            " starts will be slower"
        )
        jax.config.update("jax_enable_compilation_cache", False)  # JAX would warn of each program
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", -1.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
