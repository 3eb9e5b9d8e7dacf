"""Device meshes and the table from logical axes to mesh axes. Imports nothing of jaxserve."""

from sharding.mesh import MeshShape, make_mesh, parse_mesh
from sharding.rules import RULES, named_sharding, partition_spec

__all__ = ["RULES", "MeshShape", "make_mesh", "named_sharding", "parse_mesh", "partition_spec"]
