"""`/v1/models`: the one model that this server has, in OpenAI's form and in Anthropic's at once.

Source of the forms: OpenAI's API reference, "Models", and Anthropic's, "List Models".
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.context import context_of
from jaxserve.server.errors import json_response
from jaxserve.server.holder import EngineHolder

EMBEDDINGS = ("embedding_size", "embedding_pooling")  # facts that clients of /v1/embeddings need


async def list_models(http: Request) -> Response:
    """503 until the model is warm: routers read this as readiness."""
    holder = context_of(http).holder
    model = _model(holder)
    pages = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}
    return json_response({"object": "list", "data": [model], **pages})


async def get_model(http: Request) -> Response:
    holder = context_of(http).holder
    model = _model(holder)
    holder.check_model(http.path_params["model"])
    return json_response(model)


def _model(holder: EngineHolder) -> dict[str, Any]:
    engine = holder.ready()
    embeds = {name: engine.facts[name] for name in EMBEDDINGS if name in engine.facts}
    return {
        "id": holder.model_name,
        "object": "model",
        "created": holder.created,
        "owned_by": "jaxserve",
        "type": "model",
        "display_name": holder.model_name,
        "created_at": datetime.fromtimestamp(holder.created, UTC).isoformat(),
        "max_model_len": engine.limits.max_model_len,
        **embeds,
    }
