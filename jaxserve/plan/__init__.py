"""What a model needs and can reach on chips that are not here: `jaxserve plan`.

    model's config + slice -> meshes compared by arithmetic -> decode and prefill compiled for one -> report

`chips.json` holds what is known of each chip, `roofline` the arithmetic of a step, `sizes` the bytes on one
device, `choose` compares meshes, `compiled` asks the compiler. These run in an environment that holds the
chip's compiler (`worker`); `run` calls it from the ordinary one, and `report` shows what it says.
"""
