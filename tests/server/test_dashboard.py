"""docs/dashboards/jaxserve.json asks for metrics that there are, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.response_cache import CachingEngine, ResponseCache
from jaxserve.server.metrics import ROWS
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "dashboards" / "jaxserve.json"
# labels that Prometheus itself puts on what it scrapes, and those of a histogram's buckets
THEIRS = {"job", "instance", "le"}


class Counting(FakeEngine):
    """With the engine's own histogram of batch sizes."""

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), f"{ROWS}1": 3, f"{ROWS}4": 1, "decode_rows": 6}


def expressions(dashboard: dict[str, Any]) -> dict[str, str]:
    """Panel's title and target -> PromQL."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    }


def test_every_metric_and_label_of_the_dashboard_exists(serve: Serve, tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "responses.sqlite", 2**20, pytest.fail)
    served = serve(CachingEngine(Counting(), cache))
    assert served.completion(max_tokens=5).status_code == 200
    line = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": MODEL, "prompt": "a"},
    }
    given = served.openai.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    served.openai.batches.create(input_file_id=given.id, endpoint="/v1/completions", completion_window="24h")
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(served.http.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = expressions(dashboard)
    assert len(asked) > 20
    for where, expression in asked.items():
        names = set(re.findall(r"\b(?:jaxserve_|vllm:)[a-z0-9_:]+", expression))
        assert names, where
        assert names <= set(labels), (where, names - set(labels))
        known = set().union(*(labels[name] for name in names)) | THEIRS
        used = {
            label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")
        } | set(re.findall(r"(\w+)=~", expression))
        assert used <= known, (where, used - known)
    shown = re.findall(r"\{\{(\w+)\}\}", json.dumps(dashboard["panels"]))
    assert set(shown) <= set().union(*labels.values()) | THEIRS
    queries = [one["definition"] for one in dashboard["templating"]["list"] if "definition" in one]
    assert all("jaxserve_ready" in query for query in queries)


def test_panels_do_not_lie_over_each_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
