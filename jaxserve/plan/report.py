"""What a plan says, for people: a table in text, and a plot. Reads the report alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from jaxserve.plan.chips import SHARE_VARIABLES

Report = dict[str, Any]


def text(report: Report) -> str:
    """The whole report as lines."""
    model, where = report["model"], report["chips"]
    lines = [
        f"{model['name']}: {model['model_type']} of {model['parameters'] / 1e9:.2f} B parameters in"
        f" {model['dtype']}, on {where['slice']} ({where['count']} chip(s), {where['form']})",
    ]
    if report["fits"]:
        lines.append(f"fits, with --mesh {mesh_text(report['mesh'])}")
        for one in report["passed_over"]:
            lines.append(f"(not with {one['mesh']}: {one['why']})")
    else:
        lines.append(f"does not fit: {report['reason']}")
        if where["taken_by_runtime"] < where["memory"]:
            lines.append(
                f"(jax takes {where['taken_by_runtime'] / where['memory']:.0%} of the {where['memory']:,}"
                f" bytes of each; {SHARE_VARIABLES[0]}=0.95, here and for the server, lets it take more)"
            )
    lines += ["", *_bytes(report)]
    if report["fits"]:
        lines += ["", *_holds(report), "", *_points(report)]
    if len(report["meshes"]) > 1:
        lines += ["", *_meshes(report)]
    return "\n".join(lines)


def mesh_text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def _bytes(report: Report) -> list[str]:
    held, programs = report["bytes"], report["compiled"]
    lines = [f"{'bytes on one device':<34}{'counted':>16}" + (f"{'compiled':>16}" if programs else "")]

    def row(what: str, size: int | None, compiled: int | None = None) -> None:
        if size is not None:
            lines.append(f"{what:<34}{size:>16,}" + ("" if compiled is None else f"{compiled:>16,}"))

    decode = programs["decode"] if programs else None
    row("weights", held["weights"], decode and decode["weights"])
    if decode is None:
        row("limit", held["limit"])
        return lines
    page = held["page"]
    # compiled with as many pages as there were before temporaries were known
    row("KV pool", held["pool"], decode["pool"] // decode["pages"] * (held["pool"] // page))
    row("slots' state", held["state"])
    row("temporaries and results", held["temporaries"])
    row("needed", held["needed"])
    where = report["chips"]
    share = report["options"]["memory_fraction"]
    row(f"may be used ({share:g} of {where['taken_by_runtime']:,})", held["limit"])
    for kind in ("decode", "prefill"):
        one = programs[kind]
        unit = "rows" if kind == "decode" else "tokens"
        lines.append(
            f"{kind} of {one['bucket']} {unit}: {one['memory']['temporary']:,} bytes of temporaries,"
            f" {one['kernel_calls']} kernel call(s), {one['copies']} copies of the pool,"
            f" {sum(one['collectives'].values())} collective(s), compiled in {one['seconds']:.1f} s"
        )
    lines.append("; ".join(f"{kernel}: {name}" for kernel, name in programs["kernels"].items()))
    return lines


def _holds(report: Report) -> list[str]:
    pool, slots = report["pool"], report["slots"]
    replicas = f", {pool['replicas']} replicas of {slots['of_a_replica']}" if pool["replicas"] > 1 else ""
    contexts = ", ".join(f"{one['slots']} x {one['tokens']:,}" for one in report["contexts"])
    by = "pool" if report["max_model_len"] < report["model"]["context"] else "model or --max-model-len"
    ask = (
        "" if report["options"]["max_slots"] is not None else f" (serve --max-slots {slots['of_a_replica']})"
    )
    return [
        f"pool of {pool['tokens']:,} tokens; {slots['full']} slots at their full length{replicas}, bound by"
        f" {slots['bound']}{ask}",
        f"slots x longest context: {contexts} (at most {report['max_model_len']:,}, by the {by})",
    ]


def _points(report: Report) -> list[str]:
    options, prefill = report["options"], report["prefill"]
    priced = options["price"] is not None
    lines = [
        f"at most, by the chips' rated numbers; prompts of {options['input_tokens']:,} tokens and"
        f" {options['output_tokens']:,} drawn:",
        f"{'slots':>6}{'first token':>14}{'bound':>14}{'a token':>12}{'bound':>14}{'tokens/s':>12}"
        f"{'with prompts':>14}" + (f"{'per 1M drawn':>14}" if priced else ""),
    ]
    for one in report["points"]:
        if one["shown"]:
            lines.append(
                f"{one['slots']:>6}{seconds(one['first_token']):>14}{one['first_token_bound']:>14}"
                f"{seconds(one['token']):>12}{one['bound']:>14}{one['tokens_per_second']:>12,.0f}"
                f"{one['with_prompts']:>14,.0f}"
                + (f"{one['cost_per_million_output']:>14,.3f}" if priced else "")
            )
    cost = f", {prefill['cost_per_million_input']:,.3f} a million" if priced else ""
    lines.append(
        f"prompts alone: {prefill['tokens_per_second']:,.0f} tokens/s, bound by {prefill['bound']}{cost}"
    )
    return lines


def _meshes(report: Report) -> list[str]:
    lines = [
        f"{'mesh, by arithmetic':<28}{'weights':>16}{'pool tokens':>14}{'slots':>7}{'alone':>12}{'full':>12}"
        f"{'with prompts':>14}"
    ]
    best = mesh_text(report["mesh"])
    for one in report["meshes"]:
        head = f"{one['mesh'] + (' *' if one['mesh'] == best else ''):<28}{one['weights']:>16,}"
        if one["fits"]:
            lines.append(
                f"{head}{one['pool_tokens']:>14,}{one['slots']:>7}{seconds(one['token_alone']):>12}"
                f"{seconds(one['token_full']):>12}{one['with_prompts']:>12,.0f}/s"
            )
        else:
            lines.append(f"{head}  does not fit")
    return lines


def plot(report: Report, file: Path) -> None:
    """Memory of one device, and tokens/s against seconds a token over slots. Raises ImportError without
    matplotlib, ValueError for a file name that it cannot write as a picture, OSError."""
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    held = report["bytes"]
    bottom = 0.0
    for name in ("weights", "pool", "state", "temporaries"):
        if (size := held[name]) and (report["fits"] or name == "weights"):
            left.bar(["one device"], [size / 1e9], bottom=bottom, label=name)
            bottom += size / 1e9
    left.axhline(held["limit"] / 1e9, color="black", linestyle="--", label="may be used")
    left.set_ylabel("GB")
    left.legend()
    model, where = report["model"]["name"], report["chips"]["slice"]
    left.set_title(f"{model} on {where}")
    if report["fits"]:
        rows = report["points"]
        slots = [row["slots"] for row in rows]
        right.plot(slots, [row["tokens_per_second"] for row in rows], marker="o", label="tokens/s, drawn")
        right.plot(slots, [row["with_prompts"] for row in rows], marker="s", label="tokens/s, with prompts")
        right.set(xscale="log", yscale="log", xlabel="slots", ylabel="tokens/s at most")
        times = right.twinx()
        times.plot(slots, [row["token"] * 1e3 for row in rows], color="gray", label="ms a token")
        times.set_ylabel("ms a token at least")
        times.set_ylim(bottom=0)
        right.set_title(f"--mesh {mesh_text(report['mesh'])}")
        handles = [*right.get_lines(), *times.get_lines()]
        right.legend(handles, [line.get_label() for line in handles], loc="upper left")
    else:
        right.axis("off")
        right.text(0, 0.5, f"does not fit:\n{report['reason']}", wrap=True)
    figure.savefig(file, dpi=120)
