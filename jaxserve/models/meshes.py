"""Which meshes a model fits on, and the one it gets where nobody said.

Knows the model's sizes and the number of devices; not what memory or links they have.
"""

from __future__ import annotations

from jaxserve.models.config import ModelConfig
from sharding import MeshShape, kv_parts

# of a TPU's registers and matrix unit, and rows of a product on Hopper: what a part of an expert should fill
LANES = 128
MOST_NAMED = 64  # devices up to which an error lists what would do


def check_mesh(config: ModelConfig, shape: MeshShape) -> None:
    """Raises ValueError naming what of the mesh does not divide what of the model, and what would."""
    if fault := _fault(config, shape):
        tensors = (MeshShape(tensor=n, expert=shape.expert) for n in range(1, MOST_NAMED + 1))
        fitting = [str(one.tensor) for one in tensors if not _fault(config, one)]
        beside = f" beside expert={shape.expert}" if shape.expert > 1 else ""
        hint = f"; tensor may be {', '.join(fitting)}{beside}" if fitting else ""
        raise ValueError(f"--mesh {fault}{hint}")


def _fault(config: ModelConfig, shape: MeshShape) -> str | None:
    """What does not go with the mesh, or None."""
    c, both = config, f"tensor={shape.tensor}" + (f",expert={shape.expert}" if shape.expert > 1 else "")
    if shape.expert > 1 and not c.num_experts:
        return (
            f"expert={shape.expert}: {c.model_type} is a dense model and has no experts to spread;"
            f" use tensor={shape.replica}"
        )
    if c.num_experts and c.num_experts % shape.expert:
        return f"expert={shape.expert} does not divide the model's num_experts={c.num_experts}"
    if c.mlp_size % shape.tensor:
        if c.num_experts:
            return (
                f"tensor={shape.tensor} does not divide the inner size of an expert, {c.mlp_size}"
                " (intermediate_size or moe_intermediate_size)"
            )
        return f"tensor={shape.tensor} does not divide the model's intermediate_size={c.mlp_size}"
    try:
        kv_parts(shape, c.num_kv_heads)
    except ValueError as error:
        return f"{both} does not divide the model's num_key_value_heads={c.num_kv_heads}: {error}"
    for name, size in (("num_attention_heads", c.num_heads), ("vocab_size", c.vocab_size)):
        if size % shape.replica:
            return f"{both} does not divide the model's {name}={size}"
    return None


def choose_mesh(config: ModelConfig, devices: int) -> MeshShape:
    """One replica over as many of the devices as the model's sizes divide by.

    Tensor parallelism shares out every step evenly, experts only as far as tokens do: so experts are spread
    just so far that a device's part of one is a multiple of LANES wide, where it can be.
    """
    for count in range(devices, 1, -1):
        fitting = [
            shape
            for expert in range(1, count + 1)
            if count % expert == 0
            and not _fault(config, shape := MeshShape(tensor=count // expert, expert=expert))
        ]
        if fitting:
            full = [one for one in fitting if not config.mlp_size // one.tensor % LANES]
            return (full or fitting)[0]
    return MeshShape()
