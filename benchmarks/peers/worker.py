"""One peer's process: reads commands, a JSON line each, answers each with one.

    python -m benchmarks.peers.worker NAME SETTINGS

Whatever the peer's library prints goes to stderr, which the parent keeps in a file.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from benchmarks.peers import Peer, Settings, load


def answer(peer: Peer, command: dict) -> dict:
    match command.pop("do"):
        case "variants":
            return {"variants": peer.variants(**command)}
        case "measure":
            rate, tokens = peer.measure(**command)
            return {"rate": rate, "tokens": tokens}
        case "probe":
            return {"rates": peer.probe() if hasattr(peer, "probe") else {}}
        case "facts":
            return {"facts": peer.facts()}
        case other:
            raise ValueError(f"no such command: {other}")


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # C++ libraries print to file descriptor 1 too

    def reply(value: dict) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        peer = load(sys.argv[1], Settings(**json.loads(sys.argv[2])))
        reply({"versions": peer.versions})
    except ImportError as error:
        traceback.print_exc()
        reply({"error": f"not installed: {error}"})
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    for line in sys.stdin:
        try:
            reply(answer(peer, json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # the peers' threads are not ours to join


if __name__ == "__main__":
    main()
