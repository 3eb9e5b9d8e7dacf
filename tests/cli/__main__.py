"""`python -m tests.cli ...`: the command line with the fake engine in the place of `jaxserve.build`.

JAXSERVE_TEST_BUILD chooses what building does: "fail" raises, "hang" takes a minute, "no-template" has no
chat template.
"""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from jaxserve.cli.main import main
from jaxserve.config import EngineOptions
from tests.fakes import FakeTokenizer
from tests.server.fakes import FakeEngine

build = types.ModuleType("jaxserve.build")


def build_serving(
    model: str | None, options: EngineOptions, *, progress: Callable[[str], None]
) -> FakeEngine:
    how = os.environ.get("JAXSERVE_TEST_BUILD", "")
    progress(f"loading {model}")
    if how == "fail":
        raise ValueError("config.json: architectures=['Nonsense'] is not supported")
    if how == "crash":
        raise KeyError("lm_head")
    if how == "hang":
        time.sleep(60)
    tokenizer = FakeTokenizer(has_chat_template=how != "no-template")
    return FakeEngine(
        slots=options.slots,
        max_queued=options.max_queued,
        tokenizer=tokenizer,
        delay=float(os.environ.get("DELAY", "0")),
    )


def model_name(model: str | None) -> str:
    return "embedded" if model is None else model.rstrip("/").rpartition("/")[2]


def dry_run(model: str | None, options: EngineOptions, progress: Callable[[str], None]) -> str:
    progress("reading the config")
    if os.environ.get("JAXSERVE_TEST_BUILD") == "fail":
        raise ValueError("the weights do not fit")
    return f"{model}: {options.slots} slots"


names: dict[str, Any] = {"build_serving": build_serving, "model_name": model_name, "dry_run": dry_run}
vars(build).update(names)
sys.modules["jaxserve.build"] = build
sys.exit(main())
