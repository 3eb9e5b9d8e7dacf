"""Mesh shapes from their spelling, and the table from logical to mesh axes."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from sharding import RULES, MeshShape, kv_parts, make_mesh, named_sharding, parse_mesh, partition_spec, parts
from sharding.mesh import AXES, MESH_AXES


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", MeshShape()),
        ("tensor=4", MeshShape(tensor=4)),
        ("data=1,tensor=1,expert=1", MeshShape(1, 1, 1)),
        ("expert=3,data=2", MeshShape(data=2, tensor=1, expert=3)),
        ("tensor=2,", MeshShape(tensor=2)),
    ],
)
def test_parse(text: str, shape: MeshShape) -> None:
    assert parse_mesh(text) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=2", "'pipeline' is not an axis; they are data, tensor, expert"),
        ("2", "'2' is not an axis"),
        ("=2", "'' is not an axis"),
        (" tensor=2", "' tensor' is not an axis"),
        ("tensor=2,tensor=4", "'tensor' stands twice"),
        ("tensor", "'tensor' must be tensor=N"),
        ("tensor=", "'tensor=' must be tensor=N with N at least 1"),
        ("tensor=0", "'tensor=0' must be"),
        ("tensor=-1", "'tensor=-1' must be"),
        ("tensor=1.5", "'tensor=1.5' must be"),
        ("tensor=two", "'tensor=two' must be"),
        ("tensor=2=2", "'tensor=2=2' must be"),
        ("tensor=²", "'tensor=²' must be"),
        ("data=1;tensor=2", "'data=1;tensor=2' must be data=N"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--mesh") as error:
        parse_mesh(text)
    assert message in str(error.value) and repr(text) in str(error.value)


def test_mesh() -> None:
    mesh = make_mesh(parse_mesh("data=2,tensor=3"))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "tensor": 3, "tensor_copy": 1, "expert": 1, "expert_copy": 1}
    assert list(mesh.devices.flat) == jax.devices()[:6]
    some = jax.devices()[4:6]
    assert list(make_mesh(parse_mesh("tensor=2"), some).devices.flat) == some


def test_one_device_is_a_mesh_of_one() -> None:
    mesh = make_mesh(MeshShape())
    assert mesh.size == 1 and mesh.axis_names == MESH_AXES


def test_too_few_devices() -> None:
    with pytest.raises(ValueError, match=r"asks for 9 devices .*tensor=9.* there are 8"):
        make_mesh(parse_mesh("tensor=9"))
    with pytest.raises(ValueError, match=r"asks for 2 devices .* there are 1"):
        make_mesh(parse_mesh("tensor=2"), jax.devices()[:1])


@pytest.mark.parametrize(
    ("text", "kv_heads", "sizes", "expected"),
    [
        ("tensor=8", 8, (8, 1, 1, 1), 8),
        ("tensor=8", 2, (2, 4, 1, 1), 2),
        ("tensor=8", 1, (1, 8, 1, 1), 1),
        ("tensor=2", 4, (2, 1, 1, 1), 2),
        ("expert=8", 4, (1, 1, 4, 2), 4),
        ("tensor=2,expert=4", 4, (2, 1, 2, 2), 4),
        ("tensor=4,expert=2", 2, (2, 2, 1, 2), 2),
        ("tensor=2,expert=4", 8, (2, 1, 4, 1), 8),
        ("tensor=3", 6, (3, 1, 1, 1), 3),
    ],
)
def test_heads_that_are_fewer_than_devices(
    text: str, kv_heads: int, sizes: tuple[int, ...], expected: int
) -> None:
    """Queries stand in the order of the devices, and a device's key/value heads are those of its queries."""
    shape = parse_mesh(text)
    mesh = make_mesh(shape, kv_heads=kv_heads)
    assert tuple(mesh.shape.values())[1:] == sizes
    assert kv_parts(shape, kv_heads) == parts(mesh, "kv_heads") == expected
    assert parts(mesh, "heads") == parts(mesh, "vocab") == shape.replica
    assert (parts(mesh, "mlp"), parts(mesh, "expert")) == (shape.tensor, shape.expert)
    assert parts(mesh, "embed") == 1
    queries, group = 24 * kv_heads, 24
    q = named_sharding(mesh, ("heads",)).devices_indices_map((queries,))
    kv = named_sharding(mesh, ("kv_heads",)).devices_indices_map((kv_heads,))
    for device in mesh.devices.flat:
        first, last, _ = q[device][0].indices(queries)
        held = range(*kv[device][0].indices(kv_heads))
        assert {head // group for head in range(first, last)} == set(held)


@pytest.mark.parametrize(
    ("text", "kv_heads"), [("tensor=2", 3), ("tensor=4", 6), ("tensor=3", 2), ("tensor=2,expert=3", 3)]
)
def test_heads_that_do_not_go_with_the_devices(text: str, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"{kv_heads} key/value heads, nor"):
        kv_parts(parse_mesh(text), kv_heads)


def test_rules() -> None:
    """Every logical axis lies along mesh axes or none; no axis of the mesh divides an array twice."""
    assert {name for axes in RULES.values() for name in axes or ()} == set(MESH_AXES) - {"data"}
    assert set(AXES) < set(MESH_AXES)
    wide = ("tensor", "tensor_copy", "expert", "expert_copy")
    assert partition_spec(("heads", "embed")) == PartitionSpec(wide, None)
    assert partition_spec(("layer", "page", "token", "kv_heads")) == PartitionSpec(
        None, None, None, ("tensor", "expert")
    )
    assert partition_spec(("expert", "mlp")) == PartitionSpec(wide[2:], wide[:2])
    assert partition_spec((None, "vocab")) == PartitionSpec(None, wide)
    assert partition_spec(()) == PartitionSpec()
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("embed", "colour"))


def test_named_sharding_cuts_arrays() -> None:
    mesh = make_mesh(parse_mesh("tensor=4"))
    assert named_sharding(mesh, ("layer", "mlp", "embed")).shard_shape((3, 96, 64)) == (3, 24, 64)
    assert named_sharding(mesh, ("layer", "embed", "mlp")).shard_shape((3, 64, 96)) == (3, 64, 24)
    assert named_sharding(mesh, ("embed",)).shard_shape((64,)) == (64,)
