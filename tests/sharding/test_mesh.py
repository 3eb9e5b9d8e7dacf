"""Mesh shapes from their spelling, and the table from logical to mesh axes."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from sharding import RULES, MeshShape, make_mesh, named_sharding, parse_mesh, partition_spec
from sharding.mesh import AXES


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
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "tensor": 3, "expert": 1}
    assert list(mesh.devices.flat) == jax.devices()[:6]
    some = jax.devices()[4:6]
    assert list(make_mesh(parse_mesh("tensor=2"), some).devices.flat) == some


def test_one_device_is_a_mesh_of_one() -> None:
    mesh = make_mesh(MeshShape())
    assert mesh.size == 1 and mesh.axis_names == AXES


def test_too_few_devices() -> None:
    with pytest.raises(ValueError, match=r"asks for 9 devices .*tensor=9.* there are 8"):
        make_mesh(parse_mesh("tensor=9"))
    with pytest.raises(ValueError, match=r"asks for 2 devices .* there are 1"):
        make_mesh(parse_mesh("tensor=2"), jax.devices()[:1])


def test_rules() -> None:
    """Every logical axis lies along a mesh axis or none; at most one axis of an array along `tensor`."""
    assert set(RULES.values()) <= {*AXES, None}
    assert partition_spec(("heads", "embed")) == PartitionSpec("tensor", None)
    assert partition_spec(("layer", "page", "token", "kv_heads")) == PartitionSpec(None, None, None, "tensor")
    assert partition_spec((None, "vocab")) == PartitionSpec(None, "tensor")
    assert partition_spec(()) == PartitionSpec()
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("embed", "colour"))


def test_named_sharding_cuts_arrays() -> None:
    mesh = make_mesh(parse_mesh("tensor=4"))
    assert named_sharding(mesh, ("layer", "mlp", "embed")).shard_shape((3, 96, 64)) == (3, 24, 64)
    assert named_sharding(mesh, ("layer", "embed", "mlp")).shard_shape((3, 64, 96)) == (3, 64, 24)
    assert named_sharding(mesh, ("embed",)).shard_shape((64,)) == (64,)
