"""What `jaxserve plan` runs in an environment that holds a chip's compiler.

    python -m jaxserve.plan.worker < REQUEST

Reads one request as JSON, and prints lines of JSON: {"progress": text}, {"begun": mesh}, and at the end
{"report": …} or {"error": text} where the request cannot be planned.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jaxserve.plan.options import PlanOptions
from pallas_kernels import targets
from sharding.topology import parse_slice


def main() -> None:
    request = json.load(sys.stdin)

    def put(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    where = parse_slice(request["chips"])
    devices = targets.devices(where.chip, where.chips)  # before jax looks for its own
    from jaxserve.plan.examine import examine

    try:
        report = examine(
            request["config"],
            request["name"],
            where,
            PlanOptions(**request["options"]),
            devices,
            progress=lambda line: put(progress=line),
            avoid=request["avoid"],
            begun=lambda mesh: put(begun=mesh),
        )
    except ValueError as error:
        put(error=str(error))
    else:
        put(report=report)


if __name__ == "__main__":
    main()
