"""`jaxserve convert`: a Hugging Face folder, written as an Orbax checkpoint that loads onto any mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxserve import __version__
from jaxserve.cli.arguments import parse, wrong_use
from jaxserve.cli.main import DONE, FAILED
from jaxserve.cli.terminal import say


@dataclasses.dataclass(frozen=True, slots=True)
class ConvertArguments:
    """The command line.

    hf_dir: the model to convert: a local folder (Hugging Face layout), an fsspec URL or a hub id.
    out: the folder to write; it must not exist.
    dtype: of the weights in OUT; auto keeps each as it is stored.
    overwrite: replace OUT if it is a model that was converted before.
    """

    hf_dir: str | None = dataclasses.field(default=None, metadata={"positional": True})
    out: str | None = dataclasses.field(default=None, metadata={"positional": True})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    overwrite: bool = False


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    text = "Write a Hugging Face model as an Orbax checkpoint, one tensor at a time."
    arguments = parse(ConvertArguments, "jaxserve convert", text, args, environ)
    if arguments.hf_dir is None or arguments.out is None:
        wrong_use("HF_DIR and OUT are needed: the model to convert and the folder to write")
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator is not needed, and may be serving
    model, out, dtype = arguments.hf_dir, arguments.out, arguments.dtype
    try:
        convert_model(model, out, dtype, overwrite=arguments.overwrite, progress=say)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        say(f"error: {error}")
        return FAILED
    print(out)
    return DONE


def convert_model(
    model: str, out: str, dtype: str = "auto", *, overwrite: bool = False, progress: Callable[[str], None]
) -> None:
    """Checks the model's headers, then writes `out`.

    Raises ValueError (CheckpointError, ConfigError) naming the key or file, or OSError.
    """
    import numpy as np

    from checkpoints import huggingface, orbax_io, remote
    from checkpoints.convert import check_out, convert
    from checkpoints.files import CheckpointError
    from jaxserve.build import model_name, resolve_model
    from jaxserve.models import config_from_hf
    from jaxserve.models.decoder import Decoder
    from jaxserve.orbax_weights import leaves_to_save
    from jaxserve.weights import model_digest, open_huggingface

    if remote.is_url(out):
        raise CheckpointError(f"{out}: OUT must be a local folder; copy it to its place afterwards")
    target = Path(out).expanduser()
    check_out(target, overwrite=overwrite)  # before anything is downloaded
    source = resolve_model(model)
    if orbax_io.is_orbax(source):
        raise CheckpointError(f"{source}: has Orbax's layout already; it can be served as it is")
    raw = huggingface.read_config(source)
    config = config_from_hf(raw)
    decoder = Decoder(config, np.dtype(config.dtype or "float32"))
    chosen = None if dtype == "auto" else np.dtype(dtype)
    leaves = list(leaves_to_save(decoder, open_huggingface(decoder, source), chosen))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    progress(f"converting {model_name(model)}: {len(leaves)} arrays, {total} bytes")
    done, told = 0, 0

    def wrote(leaf: orbax_io.Leaf) -> None:
        nonlocal done, told
        done += math.prod(leaf.shape) * leaf.dtype.itemsize
        if done * 10 // total > told:
            told = done * 10 // total
            progress(f"{told * 10} % written")

    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": dtype}
    convert(
        source,
        target,
        leaves,
        config=None if chosen is None else raw | changed,
        facts={
            "written_by": f"jaxserve {__version__}",
            "dtypes": sorted({leaf.dtype.name for leaf in leaves}),
            "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
            "source": {
                "name": model_name(model),
                "fingerprint": f"blake2b:{model_digest(source, weights=True)}",
            },
        },
        overwrite=overwrite,
        wrote=wrote,
    )
