"""Plans of four published models on five slices, as the table in docs/plan.md.

    python -m benchmarks.plan_table [--json FILE] [--jobs N] [--only TEXT]

Needs `make aot`. No weights are read: the models are their published config.json's values that change sizes.
Exit codes: 0 every plan was made and holds what is required of it below, 1 not, 2 a compiler is missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from jaxserve.plan.options import PlanOptions
from jaxserve.plan.report import mesh_text, seconds
from jaxserve.plan.run import CompilerFailed, CompilerMissing, plan
from sharding.topology import parse_slice

LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "Llama-3.1-70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
}
SLICES = ("v5e-8", "v6e-8", "v5p:2x2x1", "h100-1", "h100-8")
# what is asked of the table: the 70B in bfloat16
MUST_FIT = {"v5e-8": False, "v6e-8": True, "h100-1": False, "h100-8": True}
TOLERANCE = 0.02  # of counted against compiled bytes

Report = dict[str, Any]


def faults(model: str, where: str, report: Report) -> list[str]:
    """What a plan does not hold of what is asked."""
    found = []
    if model == "Llama-3.1-70B" and report["fits"] != MUST_FIT.get(where, report["fits"]):
        found.append(f"fits={report['fits']}: {report['reason']}")
    if not report["fits"] and not report["missing_bytes"]:
        found.append("refused without the bytes that are missing")
    if (programs := report["compiled"]) is not None:
        held = report["bytes"]
        for kind in ("decode", "prefill"):
            one = programs[kind]
            for what, counted in (("weights", held["weights"]), ("pool", held["page"] * one["pages"])):
                if abs(one[what] - counted) > TOLERANCE * counted:
                    found.append(f"{kind}: {what} of {counted} bytes by count, {one[what]} compiled")
            if one["copies"]:
                found.append(f"{kind}: {one['copies']} copies of the pool")
    return found


HEAD = (
    "| model | slice | mesh | GB a device: weights, pool, temporaries, of | slots x context | first token"
    " | a token at 1 / 8 / 64 / all slots | waits for | tokens/s, all slots (with prompts) | compiled in |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def row(model: str, where: str, report: Report) -> str:
    held, gb = report["bytes"], 1e9
    if not report["fits"]:
        missing = report["missing_bytes"]
        lack = f"{missing:,} bytes of each device are missing" if missing else report["reason"]
        return (
            f"| {model} | {where} | | {held['weights'] / gb:.1f}, –, –, {held['limit'] / gb:.1f}"
            f" | **does not fit**: {lack} | | | | | |"
        )
    shown = [one for one in report["points"] if one["shown"]]
    most = shown[-1]
    contexts = report["contexts"]
    programs = report["compiled"]
    spent = sum(programs[kind]["seconds"] for kind in ("decode", "prefill"))
    cells = [
        model,
        where,
        mesh_text(report["mesh"]),
        f"{held['weights'] / gb:.1f}, {held['pool'] / gb:.1f}, {held['temporaries'] / gb:.2f},"
        f" {held['limit'] / gb:.1f}",
        f"1 x {contexts[0]['tokens']:,}; {contexts[-1]['slots']} x {contexts[-1]['tokens']:,}",
        seconds(shown[0]["first_token"]),
        " / ".join(f"{one['token'] * 1e3:.2f}" for one in shown) + " ms",
        " / ".join(one["bound"] for one in shown),
        f"{most['tokens_per_second']:,.0f} ({most['with_prompts']:,.0f})",
        f"{spent:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="writes the plans there")
    parser.add_argument("--jobs", type=int, default=2, help="plans at a time")
    parser.add_argument("--only", default="", help="models and slices whose `MODEL SLICE` holds this")
    args = parser.parse_args()
    options = PlanOptions()
    wanted = [(m, s) for m in MODELS for s in SLICES if args.only in f"{m} {s}"]
    start = time.perf_counter()

    def one(pair: tuple[str, str]) -> tuple[Report | None, str, float]:
        model, where = pair
        begin = time.perf_counter()
        try:
            report = plan(MODELS[model], model, parse_slice(where), options)
        except (CompilerFailed, ValueError) as error:
            return None, str(error), time.perf_counter() - begin
        return report, "", time.perf_counter() - begin

    reports, failed = [], 0
    print(HEAD, flush=True)
    try:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for (model, where), (report, error, spent) in zip(wanted, pool.map(one, wanted), strict=True):
                if report is None:
                    failed += 1
                    print(f"{model} on {where}: {error}", file=sys.stderr, flush=True)
                    continue
                print(row(model, where, report), flush=True)
                for fault in faults(model, where, report):
                    failed += 1
                    print(f"{model} on {where}: {fault}", file=sys.stderr, flush=True)
                reports.append({"wall_seconds": round(spent, 1), **report})
    except CompilerMissing as error:
        print(error, file=sys.stderr)
        return 2
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\n{len(wanted)} plans, {failed} fault(s), {time.perf_counter() - start:.0f} s on {os.cpu_count()}"
        f" cores, {used.ru_utime + used.ru_stime:.0f} s of processor time",
        file=sys.stderr,
    )
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
