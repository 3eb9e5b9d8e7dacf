"""What a context of 128k costs over tensor-parallel devices, and what a context axis could change.

    python -m benchmarks.long_context [--context 131072] [--json FILE]

Arithmetic alone. For each model and eight devices: how many such sequences fit, a decoding step of one,
and its prefill by tensor parallelism, against the best split of the same devices into a context axis whose
weights fit (c groups that hold a c-th of the sequence each, and all of the weights each). Of the ring, only
what attention does not hide is counted. No time here was measured: rated numbers of the chips
(`jaxserve/plan/chips.json`), every part at its roofline, sums over devices hidden behind nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.aot_layout import MODELS
from jaxserve import models
from jaxserve.models.config import ModelConfig
from jaxserve.plan.chips import Chip, chips

DEVICES, BYTES, FRACTION = 8, 2, 0.9
CHIPS = ("v6e", "h100")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model's parameters: of all experts, of those that a token meets, of all else but the embedding."""

    config: ModelConfig
    experts: int
    active: int
    rest: int
    embedding: int

    @property
    def bytes(self) -> int:
        return BYTES * (self.experts + self.rest + self.embedding)


def sizes(name: str) -> Sizes:
    c = models.config_from_hf(MODELS[name])
    attention = c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
    mlp = 3 * c.hidden_size * c.mlp_size
    head = c.vocab_size * c.hidden_size
    dense = 0 if c.num_experts else mlp
    return Sizes(
        config=c,
        experts=c.num_layers * c.num_experts * mlp,
        active=c.num_layers * c.experts_per_token * mlp,
        rest=c.num_layers * (attention + dense) + (0 if c.tie_embeddings else head),
        embedding=head,
    )


def position_bytes(c: ModelConfig, tensor: int) -> int:
    """Of one position on one device: its own key/value heads, one at least."""
    return 2 * -(-c.num_kv_heads // tensor) * c.head_dim * BYTES * c.num_layers


def prefill(model: Sizes, chip: Chip, length: int, tensor: int, context: int) -> dict[str, float]:
    """Seconds of one prompt over tensor x context devices."""
    c, devices = model.config, tensor * context
    products = 2 * length * (model.rest - c.vocab_size * c.hidden_size + model.active) / devices
    attention = 4 * c.q_size * length * (length + 1) / 2 * c.num_layers / devices
    stream = length // context * c.hidden_size * BYTES
    sums = (2 * c.num_layers + 1) * chip.all_reduce(stream, tensor)
    rate = chip.link_bandwidth * (2 if chip.network == "torus" else chip.links)
    ring = (context - 1) * length // context * position_bytes(c, tensor) / rate
    seconds = {"products": products / chip.rate("bfloat16"), "attention": attention / chip.rate("bfloat16")}
    hidden = min(ring, seconds["attention"])
    return seconds | {"sums": sums, "ring": ring, "seconds": sum(seconds.values()) + sums + ring - hidden}


def decode(model: Sizes, chip: Chip, length: int, tensor: int) -> dict[str, float]:
    """Seconds of one token of one sequence: every device reads its weights and its part of the cache."""
    c = model.config
    weights = BYTES * (model.rest + model.active) / tensor / chip.bandwidth
    cache = length * position_bytes(c, tensor) / chip.bandwidth
    sums = (2 * c.num_layers + 1) * chip.all_reduce(c.hidden_size * BYTES, tensor)
    return {"weights": weights, "cache": cache, "sums": sums, "seconds": weights + cache + sums}


def row(name: str, chip: Chip, length: int) -> dict[str, Any]:
    model = sizes(name)
    c, room = model.config, int(chip.usable({}) * FRACTION)

    def fitting(tensor: int, groups: int) -> float:
        """Sequences of that length, on all devices together."""
        left = room - model.bytes / tensor
        return max(left, 0.0) / (position_bytes(c, tensor) * length) * groups

    options = [
        (prefill(model, chip, length, DEVICES // parts, parts), parts)
        for parts in (2, 4, 8)
        if fitting(DEVICES // parts, 1) * parts >= 1
    ]
    best, parts = min(options, key=lambda pair: pair[0]["seconds"], default=({}, 0))
    tensor = prefill(model, chip, length, DEVICES, 1)
    step = decode(model, chip, length, DEVICES)
    copies = max(1, DEVICES // c.num_kv_heads)
    return {
        "model": name,
        "chip": f"{chip.name}-{DEVICES}",
        "weight_gb": model.bytes / DEVICES / 1e9,
        "cache_gb": position_bytes(c, DEVICES) * length / 1e9,
        "fit": fitting(DEVICES, 1),
        "decode_ms": {key: 1e3 * value for key, value in step.items()},
        # with a context axis no head would lie on two devices
        "decode_gain": step["seconds"] / (step["seconds"] - step["cache"] * (1 - 1 / copies)),
        "prefill_s": tensor,
        "context": parts,
        "context_prefill_s": best,
        "prefill_gain": tensor["seconds"] / best["seconds"] if best else None,
        "context_fit": fitting(DEVICES // parts, parts) if parts else 0.0,
        # replicas of so many devices as there are heads: data x tensor in place of copies
        "data_fit": fitting(DEVICES // copies, copies) if copies > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row(name, chips()[chip], args.context) for name in MODELS for chip in CHIPS]
    print(f"one sequence of {args.context} tokens, bf16, {DEVICES} devices; GB on one device, ms, s\n")
    print(
        f"{'model':<15}{'devices':<9}{'weights':>8}{'cache':>7}{'fit':>7} |{'decode':>7}{'gain':>6} |"
        f"{'prefill':>8}{'sums':>6}{'attn':>6} |{'context':>8}{'prefill':>8}{'gain':>6}{'fit':>7} |"
        f"{'data fit':>9}"
    )
    for each in rows:
        tensor, other = each["prefill_s"], each["context_prefill_s"]
        line = (
            f"{each['model']:<15}{each['chip']:<9}{each['weight_gb']:>8.1f}{each['cache_gb']:>7.2f}"
            f"{each['fit']:>7.1f} |{each['decode_ms']['seconds']:>7.2f}{each['decode_gain']:>6.2f} |"
            f"{tensor['seconds']:>8.2f}{tensor['sums']:>6.2f}{tensor['attention']:>6.2f} |"
        )
        if other:
            line += (
                f"{each['context']:>8}{other['seconds']:>8.2f}{each['prefill_gain']:>6.2f}"
                f"{each['context_fit']:>7.1f} |"
            )
        else:
            line += f"{'-':>8}{'no room':>8}{'':>6}{'':>7} |"
        print(line + (f"{each['data_fit']:>9.1f}" if each["data_fit"] is not None else f"{'-':>9}"))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
