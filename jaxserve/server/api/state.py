"""`/state`: what the page shows of the server once a second: slots, pages, the queue, and how fast it goes.

Figures that grow are sent as they stand, histograms included: the page takes the difference of two answers,
so that watching adds nothing to what is done per token. Engine and histograms are read when asked, as for
`/metrics`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import SlotView, Tier
from jaxserve.server.auth import tenant_of
from jaxserve.server.context import Context, context_of
from jaxserve.server.errors import ApiError, json_response
from jaxserve.server.metrics import Tally

MAX_NAMED = 16  # request ids that a page may call its own
_SECRET = secrets.token_bytes(16)  # an id's short form is the same for as long as the process lives


async def state(http: Request) -> Response:
    """200 in every state of the server, which `status` names: loading, ready, stopping, failed or stuck.

    `mine` (repeated): ids of the caller's own requests, which marks their slots. Where the server has keys,
    the id of a request that the caller does not name is shown as a digest: it may be another's.
    """
    named = http.query_params.getlist("mine")[:MAX_NAMED]
    context = context_of(http)
    engine = context.holder.engine
    status, message = _status(context)
    body: dict[str, Any] = {"status": status, "message": message, "model": context.holder.model_name}
    body["seconds"] = time.monotonic()  # what rates are taken over
    if engine is not None:
        body |= _figures(engine, named, bool(tenant_of(http)))
    body["latency"] = {
        "ttft": _histogram(context.metrics.time_to_first_token),
        "itl": _histogram(context.metrics.inter_token_latency),
    }
    return json_response(body, headers={"Cache-Control": "no-store"})


def _status(context: Context) -> tuple[str, str | None]:
    try:
        context.holder.ready()
    except ApiError as error:
        word = {"engine_failed": "failed", "engine_stuck": "stuck"}.get(error.code or "", error.code)
        return word or "failed", error.message
    return "ready", None


def _figures(engine: EngineLike, named: Sequence[str], keyed: bool) -> dict[str, Any]:
    stats = engine.stats()
    used, cached, total = stats["pages_used"], stats["pages_cached"], stats["pages_total"]
    return {
        "chat": engine.tokenizer is not None and engine.tokenizer.has_chat_template,
        "context": engine.limits.max_model_len,
        "slots": {"total": stats["slots"], "held": [_slot(view, named, keyed) for view in engine.slots()]},
        "pages": {
            "total": total,
            "used": used,
            "cached": cached,
            "free": total - used - cached,
            "tokens": stats["page_size"],
        },
        "queue": {
            "running": stats["running"],
            "waiting": stats["waiting"],
            "preempted": stats["preempted_online"] + stats["preempted_batch"],
            "tokens": stats["waiting_tokens"],
        },
        "totals": {
            "prompt_tokens": stats["prompt_tokens_total"],
            "generated_tokens": stats["generation_tokens_total"],
            "requests": stats["requests_total"],
            "refused": stats["rejected_total"],
            "prefix_queried": stats["prefix_queries_tokens"],
            "prefix_hit": stats["prefix_hit_tokens"],
        },
    }


def _slot(view: SlotView, named: Sequence[str], keyed: bool) -> dict[str, Any]:
    # a request of several prompts has an engine request for each, at most four digits after the id
    whole, _, number = view.request_id.rpartition("-")
    mine = view.request_id in named or (number.isdecimal() and len(number) <= 4 and whole in named)
    return {
        "slot": view.slot,
        "request": view.request_id if mine or not keyed else digest(view.request_id),
        "mine": mine,
        "index": view.index,
        "tier": "flex" if view.tier is Tier.BATCH else "default",
        "state": str(view.status),
        "prompt": view.prompt,
        "computed": view.computed,
        "cached": view.cached,
        "generated": view.generated,
        "pages": view.pages,
        "shared": view.shared,
    }


def digest(request_id: str) -> str:
    """Eight hexadecimal digits that tell requests apart and do not lead back to the id."""
    return hashlib.blake2b(request_id.encode(), key=_SECRET, digest_size=4).hexdigest()


def _histogram(tally: Tally) -> dict[str, Any]:
    """Its buckets' upper bounds and cumulative counts, the last without a bound; seconds."""
    return {"bounds": [*tally.bounds, None], "counts": tally.cumulative(), "sum": tally.sum}
