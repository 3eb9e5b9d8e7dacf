"""A batch job under a server that is killed again and again, with a real engine: nothing lost, nothing
doubled, not a byte different."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from jaxserve.server.jobs.store import Batch, Bounds, File, Store
from tests.serving import Server, started
from tests.tiny import write_model

pytestmark = pytest.mark.slow

LINES, KILLS = 400, 10
FILE_ID, BATCH_ID = "file-" + "1" * 32, "batch_" + "2" * 32
BOUNDS = Bounds(files=10, of_key=2**30, of_all=2**30)
ARGS = (
    *("--max-slots", "4", "--prefill-chunk", "32", "--max-model-len", "96", "--page-size", "16"),
    *("--reproducible", "--log-level", "warning"),
)


def queue_job(folder: Path) -> None:
    """The folder, as a server leaves it that was asked for a job and killed."""
    rng = random.Random(0)
    content = b""
    for number in range(LINES):
        body = {
            "model": "tiny",
            "prompt": [rng.randrange(320) for _ in range(rng.randrange(1, 40))],
            "max_tokens": rng.randrange(1, 48),
            "temperature": rng.choice([0.0, 1.0]),
            "logprobs": 2,
        }
        if number % 50 == 7:
            body["top_p"] = 9  # refused: it goes into the error file
        entry = {"custom_id": f"line {number}", "method": "POST", "url": "/v1/completions", "body": body}
        content += json.dumps(entry).encode() + b"\n"
    now = int(time.time())
    store = Store(folder)
    written = store.incoming()
    written.write_bytes(content)
    store.add_file(b"", File(FILE_ID, "in.jsonl", "batch", len(content), now, None), written, BOUNDS)
    body = {
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "expires_at": now + 86400,
        "metadata": None,
    }
    store.add_batch(Batch(BATCH_ID, b"", "tiny", "validating", FILE_ID, now, 0, 0, body))
    store.close()


def job(server: Server) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{server.url}/v1/batches/{BATCH_ID}", timeout=30).json()
    return found


def finished(server: Server) -> dict[str, bytes]:
    deadline = time.monotonic() + 120
    while (found := job(server))["status"] != "completed":
        assert time.monotonic() < deadline, (found, server.printed())
        time.sleep(0.1)
    assert found["request_counts"] == {"total": LINES, "completed": LINES - 8, "failed": 8}
    return {
        name: httpx.get(f"{server.url}/v1/files/{found[name]}/content", timeout=30).content
        for name in ("output_file_id", "error_file_id")
    }


def test_kill_9_at_ten_moments_changes_no_byte(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    queue_job(tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    options = [str(model), *ARGS, "--data-dir"]
    with started(tmp_path, [*options, str(tmp_path / "whole")]) as server:
        whole = finished(server)

    rng = random.Random(1)
    seen = []
    for _ in range(KILLS):
        with started(tmp_path, [*options, str(tmp_path / "killed")]) as server:
            time.sleep(rng.uniform(0.0, 0.5))
            found = job(server)
            seen.append((found["status"], found["request_counts"]["completed"]))  # type: ignore[index]
            time.sleep(rng.uniform(0.0, 0.05))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
    # the kills fell into the job, and what was done before stayed done
    assert sum(status == "in_progress" for status, _ in seen) >= KILLS // 2, seen
    counts = [count for _, count in seen]
    assert counts == sorted(counts) and counts[-1] > 0, seen

    with started(tmp_path, [*options, str(tmp_path / "killed")]) as server:
        again = finished(server)
        server.settle()
    assert again == whole
    names = [json.loads(line)["custom_id"] for line in whole["output_file_id"].splitlines()]
    failed = [json.loads(line)["custom_id"] for line in whole["error_file_id"].splitlines()]
    assert sorted(names + failed) == sorted(f"line {number}" for number in range(LINES))
    assert len({json.loads(line)["id"] for line in whole["output_file_id"].splitlines()}) == LINES - 8
