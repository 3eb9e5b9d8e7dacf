"""Anonymous host memory of a conversion and a restore.

`python -m tests.checkpoints.memory WHAT FOLDER [MESH]` prints one JSON line, in bytes: `base` before, `peak`
while it runs, `after` it, from RssAnon in /proc, which leaves out mapped files. WHAT `convert` writes
FOLDER/out from FOLDER/hf; `hf` or `out` loads that folder onto the mesh.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests import tiny

# 3.0 GB in bfloat16, of which the embedding takes 0.5
LARGE: dict[str, Any] = tiny.CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_large(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A random model of `shards` files, a tensor in memory at a time; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tiny.shapes(config)
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    keys, weight_map, total = list(shapes), {}, 0
    rng = np.random.default_rng(0)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, offset = {}, 0
        for key in keys[shard::shards]:
            end = offset + 2 * math.prod(shapes[key])
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [offset, end]}
            weight_map[key], offset = name, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in keys[shard::shards]:
                rows = math.prod(shapes[key][:-1])
                for begin in range(0, rows, 4096):
                    piece = (min(4096, rows - begin), shapes[key][-1])
                    values = rng.standard_normal(piece, np.float32) * 0.02
                    file.write(values.astype(ml_dtypes.bfloat16).tobytes())
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class Peak:
    """The most that `anonymous` says between start and end, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.base = self.value = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.value = max(self.value, anonymous())


def main() -> None:
    what, folder, mesh = sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or ["tensor=1"])[0]
    import jax
    import orbax.checkpoint  # noqa: F401  # its import is not what is measured

    from jaxserve import build
    from jaxserve.cli.convert import convert_model
    from jaxserve.config import EngineOptions
    from jaxserve.weights import load_params, open_weights

    jax.devices()
    began = time.monotonic()
    if what == "convert":
        with Peak() as peak:
            convert_model(str(folder / "hf"), str(folder / "out"), progress=lambda line: None)
        weights = 0
    else:
        loaded = build.read_model(str(folder / what), EngineOptions())
        model = build.Decoder(loaded.config, loaded.dtype)
        where = build.make_mesh(build.parse_mesh(mesh))
        with Peak() as peak:
            params = load_params(model, open_weights(model, loaded.folder), where, "scan")
            jax.block_until_ready(params)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    facts = {"base": peak.base, "peak": peak.value, "after": anonymous(), "weights": weights}
    print(json.dumps(facts | {"seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
