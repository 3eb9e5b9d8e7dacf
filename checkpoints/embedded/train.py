"""Trains the embedded model: `python -m checkpoints.embedded.train --steps 10500`.

1. Reads the running Python's standard library, sets the held-out modules aside, trains the tokenizer
   (data.py).
2. AdamW over shuffled windows; every few minutes the whole state goes to an Orbax checkpoint in `--workdir`.
   Started again, it goes on from the last one and ends with the same weights as an unbroken run.
3. Writes the Hugging Face folder to `--out`, and `evaluation.json` beside it (evaluate.py).

With `--export` it only does step 3 with the last checkpoint; with `--evaluate` it only evaluates what `--out`
holds.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from checkpoints.embedded import MODEL_DIR
from checkpoints.embedded.data import (
    BOS,
    CHAT_TEMPLATE,
    END,
    HELD_OUT,
    ROLES,
    Corpus,
    Windows,
    encode_corpus,
    read_corpus,
    train_tokenizer,
)
from checkpoints.embedded.evaluate import evaluate, write_evaluation
from checkpoints.embedded.model import ModelConfig, Params, initialise, load_model, save_model, token_losses

DEFAULT_WORKDIR = Path("~/.cache/jaxserve/embedded-train")
WATCHED = ("heapq.py", "shlex.py", "zipapp.py")
"""Held-out files scored at each checkpoint, to draw a learning curve."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything the weights depend on besides the architecture and the texts."""

    steps: int
    rows: int = 2
    short_length: int = 256  # of the pieces windows are cut into at first, when long context teaches little
    short_share: float = 0.75  # of the steps; a quarter faster than whole windows
    peak_rate: float = 3e-3
    warm_up: int = 150
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 20260

    def length(self, step: int, context: int) -> int:
        """How many tokens see each other at this step."""
        return min(self.short_length, context) if step < self.short_share * self.steps else context

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, linear warm-up, cosine to a hundredth of the peak; norms are not decayed."""
        warm_up = min(self.warm_up, self.steps // 4 + 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak_rate, warm_up, max(self.steps, warm_up + 1), self.peak_rate / 100
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                rate,
                b1=0.9,
                b2=0.98,
                weight_decay=self.weight_decay,
                mask=lambda params: {name: value.ndim > 1 for name, value in params.items()},
            ),
        )


Step = Callable[
    [Params, optax.OptState, np.ndarray | Array, int], tuple[Params, optax.OptState, Float[Array, ""]]
]


def make_step(model: ModelConfig, config: TrainConfig) -> Step:
    """(params, optimizer state, i32[rows, T + 1], length) to (params, optimizer state, mean nats per token).

    Donates the first two; `length` is static.
    """
    optimizer = config.optimizer()

    @partial(jax.jit, donate_argnums=(0, 1), static_argnums=3)
    def step(
        params: Params, moments: optax.OptState, tokens: Int[Array, "B T+1"], length: int
    ) -> tuple[Params, optax.OptState, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(
            lambda p: token_losses(p, tokens, model, jnp.bfloat16, length).mean()
        )(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    return step


def checkpoint_manager(workdir: Path) -> ocp.CheckpointManager:
    """Keeps the last two."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)


def fresh_state(model: ModelConfig, config: TrainConfig) -> dict:
    """What a checkpoint holds: `window` is the data position, `seconds` the time spent in steps so far."""
    params = initialise(model, config.seed)
    moments = config.optimizer().init(params)
    return {
        "params": params,
        "moments": moments,
        "step": np.asarray(0, np.int64),
        "window": np.asarray(0, np.int64),
        "seconds": np.asarray(0, np.float64),
    }


def latest_state(manager: ocp.CheckpointManager, model: ModelConfig, config: TrainConfig) -> dict:
    """The last checkpoint's state, or a fresh one."""
    state = fresh_state(model, config)
    if manager.latest_step() is None:
        return state
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))


def train(
    windows: Windows,
    model: ModelConfig,
    config: TrainConfig,
    workdir: Path,
    checkpoint_seconds: float = 300,
    stop_after: int | None = None,
    watch: Callable[[Params], dict[str, float]] | None = None,
) -> dict:
    """Trains to `config.steps` (or, as if killed there, `stop_after`) from the last checkpoint in `workdir`.

    Returns the state. Logs JSON lines to stdout. `watch(params)` gives figures to log at each checkpoint.
    """
    last = config.steps if stop_after is None else stop_after
    step = make_step(model, config)
    with checkpoint_manager(workdir) as manager:
        state = latest_state(manager, model, config)
        params, moments = state["params"], state["moments"]
        number, window, spent = int(state["step"]), int(state["window"]), float(state["seconds"])
        saved_at = began = time.monotonic()
        losses = []
        while number < last:
            length = config.length(number, model.context)
            params, moments, loss = step(params, moments, windows.take(window, config.rows), length)
            losses.append(float(loss))
            number, window = number + 1, window + config.rows
            if number % 20 == 0 or number == last:
                mean = float(np.mean(losses))
                losses.clear()
                now = time.monotonic()
                log(step=number, loss=round(mean, 4), window=window, seconds=round(spent + now - began, 1))
            if number == last or time.monotonic() - saved_at > checkpoint_seconds:
                state = {
                    "params": params,
                    "moments": moments,
                    "step": np.asarray(number, np.int64),
                    "window": np.asarray(window, np.int64),
                    "seconds": np.asarray(spent + time.monotonic() - began, np.float64),
                }
                manager.save(number, args=ocp.args.StandardSave(state))
                log(saved=number, **(watch(params) if watch else {}))
                saved_at = time.monotonic()
    return state


def log(**facts: object) -> None:
    """One JSON line, with the time of day."""
    print(json.dumps({"time": time.strftime("%H:%M:%S"), **facts}), flush=True)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """`tokenizer.json`, what `transformers` wants beside it, chat template and generation defaults."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": list(ROLES),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    bos, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(END)
    assert (bos, end) == (0, 1)  # config.json says so
    defaults: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": [end], "pad_token_id": end}
    defaults |= {"do_sample": True, "temperature": 0.2, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")


def export(out: Path, params: Params, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes the whole Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, params, model)
    save_tokenizer(out, tokenizer, model.context)


def evaluate_folder(out: Path, corpus: Corpus, **facts: object) -> dict:
    """Evaluates the exported (bf16) weights, writes `evaluation.json` beside the folder; returns totals."""
    params, model = load_model(out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    evaluation = evaluate(params, model, tokenizer, corpus.held_out)
    file = out.parent / "evaluation.json"
    old = json.loads(file.read_text()) if file.exists() and not facts else {}
    kept = {key: value for key, value in old.items() if key not in ("total", "files", "evaluated_python")}
    write_evaluation(file, evaluation, **(kept | facts), evaluated_python=platform.python_version())
    return evaluation["total"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints.embedded.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--steps", type=int, default=10500, help="of 2 windows of 1,024 tokens (default %(default)s)"
    )
    parser.add_argument("--workdir", type=Path, default=DEFAULT_WORKDIR, help="checkpoints and tokenizer")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the Hugging Face folder to write")
    parser.add_argument(
        "--export", action="store_true", help="export and evaluate the last checkpoint, no training"
    )
    parser.add_argument("--evaluate", action="store_true", help="evaluate what --out holds, nothing else")
    options = parser.parse_args(arguments)
    workdir = options.workdir.expanduser()

    corpus = read_corpus()
    if options.evaluate:
        log(**evaluate_folder(options.out, corpus))
        return 0

    model, config = ModelConfig(), TrainConfig(steps=options.steps)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer_file = workdir / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(corpus, model.vocabulary).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if options.export:
        with checkpoint_manager(workdir) as manager:
            state = latest_state(manager, model, config)
    else:
        tokens = encode_corpus(corpus, tokenizer)
        counts = {name: sum(map(len, getattr(tokens, name))) for name in ("library", "tests", "pairs")}
        log(
            tokens=counts,
            parameters=sum(int(np.prod(shape)) for shape in model.shapes().values()),
            **asdict(config),
        )
        watched = {path: corpus.held_out[path] for path in WATCHED}

        def watch(params: Params) -> dict[str, float]:
            total = evaluate(params, model, tokenizer, watched)["total"]
            return {"held_out": round(total["model_bits_per_byte"], 4)}

        state = train(Windows(tokens, model.context, config.seed), model, config, workdir, watch=watch)
    export(options.out, state["params"], model, tokenizer)
    total = evaluate_folder(
        options.out,
        corpus,
        steps=int(state["step"]),
        tokens_seen=int(state["window"]) * model.context,
        seconds=round(float(state["seconds"])),
        python=platform.python_version(),
        jax=jax.__version__,
        held_out=list(HELD_OUT),
    )
    log(exported=str(options.out), **total)
    return 0


if __name__ == "__main__":
    sys.exit(main())
