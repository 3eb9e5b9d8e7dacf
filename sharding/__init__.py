"""Device meshes and the table from logical axes to mesh axes. Imports nothing of jaxserve."""

from sharding.mesh import MeshShape, kv_parts, make_mesh, parse_mesh
from sharding.rules import RULES, mesh_axes, named_sharding, partition_spec, parts

__all__ = [
    "RULES",
    "MeshShape",
    "kv_parts",
    "make_mesh",
    "mesh_axes",
    "named_sharding",
    "parse_mesh",
    "partition_spec",
    "parts",
]
