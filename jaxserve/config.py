"""What a user can choose: frozen dataclasses that the command line, the environment and `LLM` all fill.

A field's name is its flag (`max_model_len` is `--max-model-len`) and its environment variable
(`JAXSERVE_MAX_MODEL_LEN`). Each is complete when made; what depends on the model or the machine is
decided in `build.py`. A value of a wrong type or choice is a ValueError that names the flag. Knows nothing
of jax.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from sharding.distributed import Place

MOST_QUEUED, MOST_QUEUED_TOKENS = 2**20, 2**40
DEFAULT_SLOTS, DEFAULT_PAGE = 16, 64


def _check_types(options: Any) -> None:
    """Raises ValueError naming the flag whose value is none that its field declares."""
    for name, declared in get_type_hints(type(options)).items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if get_origin(declared) is Literal:
            if value not in get_args(declared):
                raise ValueError(f"{flag}={value!r} must be one of {', '.join(get_args(declared))}")
            continue
        kinds = get_args(declared) or (declared,)  # of `int | None` both
        if float in kinds:
            kinds += (int,)
        # bool is an int in Python; `max_slots=True` is a mistake, not 1
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            word = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kinds[0]]
            raise ValueError(f"{flag}={value!r} must be {word}")


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded, laid out and run.

    dtype: of weights and KV pages; auto takes what the checkpoint says.
    max_model_len: longest context in tokens, prompt and generated together; None takes the model's own.
    max_slots: sequences that decode together; None takes what `jaxserve tune` found for this model and
        machine, else 16.
    page_size: tokens per KV page; None likewise, else 64.
    kv_pages: pages in the pool; None takes what memory holds, at most what all slots can use.
    memory_fraction: share of the device's (on CPU: the free) memory that weights, pool and programs may take.
    prefill_chunk: prompt tokens computed between two decode steps; None likewise, else it goes by the
        objective.
    tuned: use what `jaxserve tune` saved, where no flag says otherwise; never with reproducible.
    mesh: devices per axis, e.g. data=1,tensor=4,expert=1; None takes all devices that the model's sizes
        divide by, one on CPU.
    seed: draws the seeds of requests that bring none; with load_format dummy, the weights too.
    load_format: auto reads the checkpoint; dummy draws random weights from config.json alone.
    objective: throughput computes prompts in chunks of 512 tokens; latency in chunks of 128, so that the
        tokens of those who already read come at shorter intervals, and fewer in all.
    prefill_replicas: engines beside the replicas of `mesh`, each on as many devices as one of these, that
        only compute prompts; the pages go from device to device.
    reproducible: the same request gets the same bits, whatever runs beside it.
    prefix_cache: start a prompt from the pages that earlier ones left.
    multi_step: tokens that each sequence draws per dispatch when nothing waits; None takes 1, or 4 for
        the objective throughput while the device waits for the host.
    overcommit: pages promised to sequences, as a share of the pool; beyond 1 some may be preempted.
    max_queued: sequences that may wait for a slot; a request beyond that is refused (HTTP 429).
    max_queued_tokens: likewise, prompt tokens that may wait; 0 takes 64 times what the page pool holds.
    step_timeout: seconds after which a device step that has not come back makes /health fail.
    response_cache: megabytes on disk for answers to requests that can have only one; 0 keeps none.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = None
    max_slots: int | None = None
    page_size: int | None = None
    kv_pages: int | None = None
    memory_fraction: float = 0.9
    prefill_chunk: int | None = None
    tuned: bool = True
    mesh: str | None = None
    seed: int = 0
    load_format: Literal["auto", "dummy"] = "auto"
    objective: Literal["throughput", "latency"] = "throughput"
    prefill_replicas: int = 0
    reproducible: bool = False
    prefix_cache: bool = True
    multi_step: int | None = None
    overcommit: float = 1.0
    max_queued: int = 1024
    max_queued_tokens: int = 0
    step_timeout: float = 120.0
    response_cache: int = 0

    def __post_init__(self) -> None:
        from sharding.mesh import parse_mesh  # late: `LLM` first checks that this package is ours

        _check_types(self)
        parse_mesh(self.mesh or "")
        for name, low, high in (
            ("max_slots", 1, 4096),
            ("page_size", 8, 1024),
            ("prefill_chunk", 16, 65536),
            ("seed", 0, 2**63 - 1),
            ("multi_step", 1, 64),
            ("overcommit", 1.0, 16.0),
            ("prefill_replicas", 0, 1024),
            ("max_queued", 1, MOST_QUEUED),
            ("max_queued_tokens", 0, MOST_QUEUED_TOKENS),
            ("step_timeout", 0.1, 86400.0),
            ("response_cache", 0, 2**20),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_slots", "page_size", "prefill_chunk", "multi_step"):
                continue
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')}={value} must lie in [{low}, {high}]")
        if self.page_tokens & (self.page_tokens - 1):
            raise ValueError(f"--page-size={self.page_size} must be a power of two")
        for name in ("max_model_len", "kv_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"--memory-fraction={self.memory_fraction} must lie in (0, 1]")

    @property
    def slots(self) -> int:
        """`max_slots`, or the default."""
        return DEFAULT_SLOTS if self.max_slots is None else self.max_slots

    @property
    def page_tokens(self) -> int:
        """`page_size`, or the default."""
        return DEFAULT_PAGE if self.page_size is None else self.page_size

    @property
    def chunk_tokens(self) -> int:
        """`prefill_chunk`, or what the objective makes it."""
        by_objective = {"throughput": 512, "latency": 128}[self.objective]
        return by_objective if self.prefill_chunk is None else self.prefill_chunk


@dataclasses.dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and for whom the server listens.

    host: the address to bind; beyond 127.0.0.1 give it a key.
    port: 0 takes a free one.
    api_key: clients must send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.
    api_key_file: likewise, one key a line, or `name: key` to have the name in the log; read again on SIGHUP.
    served_model_name: the name that requests give; None takes the last part of the folder or hub id.
    service_tier: of requests that name none: default runs first, flex in what the others leave free.
    metrics_port: serves /metrics there too, without a key, and /health and /ready; 0 takes a free port.
    cors_origin: web pages of these origins may use the server, comma-separated; * is every one.
    drain_seconds: open requests get this long to end once the server is told to stop.
    max_connections: open at once; one more is answered 503.
    log_format: of the lines on stderr; json is one object a line.
    log_level: info has a line for each request.
    otel_endpoint: sends a trace of each request to this OTLP/HTTP address, e.g. http://127.0.0.1:4318; needs
        the extra jaxserve[otel].
    data_dir: where uploaded files and batch jobs lie, made when first used; None takes
        $XDG_STATE_HOME/jaxserve, or ~/.local/state/jaxserve. One server at a time uses it.
    max_file_size: of an uploaded file, in MB.
    max_storage: of files and of jobs' results together, in MB; with api_key_file one key has half of it.
    tool_parser: the form that the model writes calls of tools in; auto tells by its chat template.
    reasoning_parser: likewise its reasoning; think is `<think>...</think>`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_key_file: str | None = None
    served_model_name: str | None = None
    service_tier: Literal["default", "flex"] = "default"
    metrics_port: int | None = None
    cors_origin: str | None = None
    drain_seconds: float = 30.0
    max_connections: int = 4096
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otel_endpoint: str | None = None
    data_dir: str | None = None
    max_file_size: int = 200
    max_storage: int = 20_000
    tool_parser: Literal["auto", "hermes", "llama3", "mistral", "none"] = "auto"
    reasoning_parser: Literal["auto", "think", "none"] = "auto"

    def __post_init__(self) -> None:
        _check_types(self)
        for name, low, high in (
            ("port", 0, 65535),
            ("metrics_port", 0, 65535),
            ("drain_seconds", 0.0, 86400.0),
            ("max_connections", 1, 2**20),
            ("max_file_size", 1, 2**20),
            ("max_storage", 1, 2**30),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')}={value} must lie in [{low}, {high}]")
        for origin in self.cors_origins:
            # a path or a stray slash never equals what a browser sends (RFC 6454, section 6.2)
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise ValueError(f"--cors-origin: {origin!r} is no origin, such as https://example.org")

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in (self.cors_origin or "").split(",") if part.strip())


@dataclasses.dataclass(frozen=True, slots=True)
class GroupOptions:
    """Several processes that serve one model together, all three flags or none.

    coordinator: HOST:PORT of process 0, as every process reaches it.
    processes: how many there are, one per host as a rule.
    process_id: which of them this is; 0 has the scheduler and answers HTTP.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        given = [self.coordinator is not None, self.processes is not None, self.process_id is not None]
        if any(given) and not all(given):
            raise ValueError("--coordinator, --processes and --process-id go together")
        self.place()

    def place(self) -> Place | None:
        """None where this process is alone."""
        if self.coordinator is None or self.processes is None or self.process_id is None:
            return None
        from sharding.distributed import Place  # late, as above

        try:
            place = Place(self.coordinator, self.processes, self.process_id)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        return None if self.processes == 1 else place
