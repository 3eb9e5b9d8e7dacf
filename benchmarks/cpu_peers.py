"""This engine, transformers and llama.cpp on the same weights in one run, alternating; prints one JSON line.

    python -m benchmarks.cpu_peers [--quick] [--rounds 3] [--only jaxserve,transformers] [--out FILE]

Random weights of SmolLM-135M's shape in bf16, random prompts of 128 tokens, greedy, end tokens ignored.
Figures: prefill of 16 prompts, and decode at each of --sequences, in tokens per second. Beside them what the
shape's matrix products alone reach in JAX, and the machine's memory and arithmetic. README.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers import NAMES, Settings, machine
from benchmarks.peers.figures import Figure, bound
from benchmarks.peers.process import Failed, Worker
from benchmarks.peers.weights import SMOLLM_135M, TINY, write_model

ROOT = Path(__file__).resolve().parent.parent
OURS, REFERENCE, MATMULS = "jaxserve", "transformers", "matmuls"
PREFILL_PROMPTS = 16
BUSY = 0.05  # above this share of the cores, something else runs


class Bench:
    """One run. `report` is what is printed; it is complete after `run`."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.shape = TINY if options.quick else SMOLLM_135M
        prompt = options.prompt_tokens
        self.figures = [
            Figure("prefill", PREFILL_PROMPTS, prompt, 1),
            *(Figure("decode", n, prompt, options.new_tokens) for n in options.sequences),
        ]
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}
        self.chosen: dict[tuple[str, str], str] = {}
        self.raw: list[dict[str, Any]] = []
        self.trials: list[dict[str, Any]] = []
        self.rates: dict[str, list[float]] = {}
        self.tokens: dict[tuple[str, str], list[list[int]]] = {}
        self.report: dict[str, Any] = {}

    def settings(self, dtype: str) -> Settings:
        return Settings(
            folder=str(self.folder / "model"),
            gguf=str(self.folder / "model.gguf"),
            dtype=dtype,
            threads=len(os.sched_getaffinity(0)),
            sequences=max(self.options.sequences),
            context=self.options.prompt_tokens + self.options.new_tokens,
            compile=self.options.compile,
        )

    def run(self) -> None:
        begin, before = time.time(), machine.idle_check()
        say(f"machine busy before the run: {before}" + ("  ** NOT QUIET **" if before["busy"] > BUSY else ""))
        say(f"writing weights to {self.folder}")
        write_model(self.folder / "model", self.shape)
        (self.folder / "model.gguf").unlink(missing_ok=True)  # of another shape, in a folder that was kept
        versions: dict[str, str] = {}
        for name in self.options.only:
            at = time.perf_counter()
            worker = Worker(name, self.settings("bfloat16"), self.folder)
            try:
                versions |= worker.ready()
                self.workers[name] = worker
                say(f"{name}: ready after {time.perf_counter() - at:.1f} s")
            except Failed as failed:
                self._drop(worker, failed)
        cpu = machine.Cpu()
        self._try_variants()
        for round_ in range(self.options.rounds):
            self._round(round_)
        facts = {name: self._ask(name, "facts") for name in list(self.workers)}
        during = cpu.shares()
        for worker in self.workers.values():
            worker.close()
        self.report = {
            "benchmark": "cpu_peers",
            "quick": self.options.quick,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin)),
            "seconds": round(time.time() - begin, 1),
            "commit": machine.commit(ROOT),
            "machine": machine.describe() | {"before": before, "during": during},
            "versions": versions,
            "model": dataclasses.asdict(self.shape) | {"dtype": "bfloat16"},
            "prompt_tokens": self.options.prompt_tokens,
            "new_tokens": self.options.new_tokens,
            "rounds": self.options.rounds,
            "unavailable": self.failed,
            "limits": {key: {"best": max(each), "all": each} for key, each in self.rates.items()},
            "figures": self._summary(),
            "agreement": self._agreement(),
            "facts": {name: fact["facts"] for name, fact in facts.items() if fact},
            "trials": self.trials,
            "raw": self.raw,
        }

    def _drop(self, worker: Worker, failed: Failed) -> None:
        self.failed[worker.name] = str(failed)
        self.workers.pop(worker.name, None)
        worker.close()
        say(f"{worker.name}: {failed}")

    def _ask(self, name: str, do: str, **what: Any) -> dict[str, Any] | None:
        """None, and the peer is out of the run, where it fails."""
        try:
            return self.workers[name].ask(do, **what)
        except Failed as failed:
            self._drop(self.workers[name], failed)
            return None

    def _measure(self, name: str, figure: Figure, round_: int, variant: str) -> dict[str, Any]:
        prompts = figure.prompts(self.shape.vocab, round_)
        time.sleep(0.1)  # the peer before has threads that spin a little before they sleep
        return self.workers[name].ask(
            "measure", kind=figure.kind, prompts=prompts, new_tokens=figure.new_tokens, variant=variant
        )

    def _try_variants(self) -> None:
        """Warms every peer up and finds its fastest way for each figure; ways that fail are noted."""
        for name in list(self.workers):
            for figure in self.figures:
                if name not in self.workers:
                    break
                # what is compiled for a static cache is compiled for its length
                warm_up_tokens = figure.new_tokens if self.options.compile else min(figure.new_tokens, 4)
                answer = self._ask(name, "variants", kind=figure.kind)
                rates: dict[str, float] = {}
                for variant in answer["variants"] if answer else ():
                    trial: dict[str, Any] = {"peer": name, "figure": figure.name, "variant": variant}
                    try:
                        # the first time compiles and allocates; its rate does not count
                        warm_up = dataclasses.replace(figure, kind="prefill", new_tokens=warm_up_tokens)
                        self._measure(name, warm_up, -1, variant)
                        rates[variant] = self._measure(name, figure, -2, variant)["rate"]
                        trial["rate"] = round(rates[variant], 2)
                    except Failed as failed:
                        trial["error"] = str(failed)
                    self.trials.append(trial)
                    say(f"trial {name} {figure.name} {variant}: {trial.get('rate', trial.get('error'))}")
                if rates:
                    self.chosen[name, figure.name] = max(rates, key=rates.__getitem__)
                elif name in self.workers:
                    error = self.trials[-1].get("error") if answer else "it offers no way to run"
                    self._drop(self.workers[name], Failed(error))

    def _round(self, round_: int) -> None:
        """Figure by figure, the peers one after the other; who begins changes from round to round."""
        for name in list(self.workers):
            for key, rate in ((self._ask(name, "probe") or {}).get("rates") or {}).items():
                self.rates.setdefault(key, []).append(round(rate, 2))
        for figure in self.figures:
            names = list(self.workers)
            for name in names[round_ % max(len(names), 1) :] + names[: round_ % max(len(names), 1)]:
                variant = self.chosen[name, figure.name]
                try:
                    answer = self._measure(name, figure, round_, variant)
                except Failed as failed:
                    self._drop(self.workers[name], failed)
                    continue
                self.raw.append(
                    {
                        "round": round_,
                        "peer": name,
                        "figure": figure.name,
                        "variant": variant,
                        "tokens_per_second": round(answer["rate"], 2),
                    }
                )
                if round_ == 0:
                    self.tokens[name, figure.name] = answer["tokens"]
                say(f"round {round_ + 1} {figure.name} {name}: {answer['rate']:.1f} tok/s")

    @property
    def _gbs(self) -> float:
        return max((max(each) for key, each in self.rates.items() if key.endswith("_gbs")), default=0.0)

    @property
    def _gflops(self) -> float:
        return max((max(each) for key, each in self.rates.items() if key.endswith("_gflops")), default=0.0)

    def _summary(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for figure in self.figures:
            bare = self._rates_of(MATMULS, figure)
            for name in self.options.only:
                rates = self._rates_of(name, figure)
                if not rates:
                    continue
                row: dict[str, Any] = {
                    "figure": figure.name,
                    "peer": name,
                    "variant": self.chosen[name, figure.name],
                    "median": round(statistics.median(rates), 2),
                    "min": min(rates),
                    "max": max(rates),
                }
                if self._gbs and self._gflops:
                    limit = bound(figure, self.shape, self._gbs, self._gflops, attention=name != MATMULS)
                    row |= {
                        "limit": limit.name,
                        "limit_tokens_per_second": round(limit.rate, 1),
                        "share_of_limit": round(row["median"] / limit.rate, 3),
                    }
                if bare and name != MATMULS:
                    row["share_of_matmuls"] = round(row["median"] / statistics.median(bare), 3)
                rows.append(row)
        return rows

    def _rates_of(self, name: str, figure: Figure) -> list[float]:
        wanted = (name, figure.name)
        return [row["tokens_per_second"] for row in self.raw if (row["peer"], row["figure"]) == wanted]

    def _agreement(self) -> dict[str, Any]:
        """Tokens until a sequence first differs from transformers', a mean over the first round's sequences.
        In bf16 they part where the two best logits are close: it shows a gross error, not a small one."""
        result: dict[str, Any] = {}
        for figure in self.figures:
            reference = self.tokens.get((REFERENCE, figure.name))
            if not reference or figure.kind == "prefill":
                continue
            for name in self.options.only:
                tokens = self.tokens.get((name, figure.name))
                if tokens and name != REFERENCE:
                    equal = [common(a, b) for a, b in zip(tokens, reference, strict=True)]
                    result.setdefault(name, {})[figure.name] = round(statistics.mean(equal), 1)
        checked = {"float32": self._check_f32()} if self.options.check_f32 else {}
        return {"of": self.options.new_tokens, "bfloat16": result, **checked}

    def _check_f32(self) -> dict[str, Any] | str:
        """One prompt in f32: the first tokens in which jaxserve and transformers agree."""
        figure = dataclasses.replace(self.figures[1], sequences=1)
        prompts = figure.prompts(self.shape.vocab, 0)
        tokens: dict[str, list[int]] = {}
        for name, variant in ((OURS, "default"), (REFERENCE, "dynamic cache")):
            worker = Worker(name, self.settings("float32"), self.folder)
            try:
                worker.ready()
                answer = worker.ask(
                    "measure", kind="decode", prompts=prompts, new_tokens=figure.new_tokens, variant=variant
                )
                tokens[name] = answer["tokens"][0]
            except Failed as failed:
                return f"{name}: {failed}"
            finally:
                worker.close()
        equal = common(tokens[OURS], tokens[REFERENCE])
        return {"equal": equal, "of": figure.new_tokens, "distinct_tokens": len(set(tokens[REFERENCE]))}


def common(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_table(report: dict[str, Any], file: TextIO) -> None:
    limits = ", ".join(f"{key} {value['best']:.1f}" for key, value in report["limits"].items())
    m = report["machine"]
    print(f"\n{m['cpu']}, {m['cores']} cores, {' '.join(m['flags'])}; commit {report['commit']}", file=file)
    print(f"busy before {m['before']['busy']:.1%}, stolen during {m['during']['stolen']:.1%}", file=file)
    print(", ".join(f"{key} {value}" for key, value in report["versions"].items()), file=file)
    print(f"measured limits (GB/s, GFLOP/s): {limits}\n", file=file)
    head = f"{'figure':<11}{'peer':<17}{'tok/s':>9}{'min':>9}{'max':>9}{'of bare':>9}"
    print(f"{head}  {'limit':<24}{'reached':>8}  variant", file=file)
    for row in report["figures"]:
        bare = f"{row['share_of_matmuls']:.0%}" if "share_of_matmuls" in row else ""
        limit = f"{row['limit']} {row['limit_tokens_per_second']:.0f}" if "limit" in row else "not measured"
        share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
        print(
            f"{row['figure']:<11}{row['peer']:<17}{row['median']:>9.1f}{row['min']:>9.1f}{row['max']:>9.1f}"
            f"{bare:>9}  {limit:<24}{share:>8}  {row['variant']}",
            file=file,
        )
    for name, reason in report["unavailable"].items():
        print(f"{name}: {reason}", file=file)
    print(f"tokens equal to transformers' from the first: {json.dumps(report['agreement'])}", file=file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=None, help="default 128 (16 with --quick)")
    parser.add_argument("--new-tokens", type=int, default=None, help="default 64 (12 with --quick)")
    parser.add_argument("--sequences", default=None, help="default 1,4,16,32 (1,4 with --quick)")
    parser.add_argument("--only", default=",".join(NAMES), help=f"default {','.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--compile", action="store_true", help="also try torch.compile (minutes)")
    parser.add_argument("--check-f32", action="store_true", help="also compare one prompt in float32")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here, indented")
    parser.add_argument("--folder", type=Path, default=None, help="keep weights and the peers' logs here")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.prompt_tokens = options.prompt_tokens or (16 if quick else 128)
    options.new_tokens = options.new_tokens or (12 if quick else 64)
    sequences = options.sequences or ("1,4" if quick else "1,4,16,32")
    options.sequences = [int(n) for n in sequences.split(",")]
    options.only = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in options.only if name not in NAMES]
    if unknown:
        parser.error(f"--only: {unknown} not in {list(NAMES)}")
    if min(options.rounds, options.prompt_tokens, *options.sequences) < 1 or options.new_tokens < 2:
        parser.error("counts must be at least 1, --new-tokens at least 2")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="cpu_peers-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, folder.resolve())
        try:
            bench.run()
        finally:
            for worker in bench.workers.values():
                worker.close()
    print_table(bench.report, sys.stderr)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(bench.report, indent=1) + "\n")
    print(json.dumps(bench.report))


if __name__ == "__main__":
    main()
