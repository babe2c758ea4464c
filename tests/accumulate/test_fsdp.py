"""A state divided among devices, and batch-norm groups on several: one run all the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import toy
from toy import Geometry, Recipe

from jaxaccum.accumulate import GeometryError, batchnorm, equivalence, fsdp, make_engine
from jaxaccum.accumulate.recipe import Window

NBS, GROUP = 16, 4


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    """Divides the toy's leaves, too, where their shapes allow."""
    monkeypatch.setattr(fsdp, "SMALLEST", 1)


def run_toy(geometry, dtype=np.float64, group=GROUP, nbs=NBS, updates=3):
    return equivalence.trace(
        toy.make_forward(), toy.make_rule(nbs), Recipe(nbs, group or "frozen"), geometry,
        *toy.initial(dtype), toy.make_batches(nbs, dtype), updates,
    )  # fmt: skip


def require_same(geometry, reference=None, **options):
    reference = run_toy(reference or Geometry(4), **options)
    found = equivalence.differences(run_toy(geometry, **options), reference)
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(4, 2, fsdp=2), Geometry(4, 4, fsdp=4),
        Geometry(2, 4, fsdp=2), Geometry(1, 4, fsdp=4), Geometry(2, 4, fsdp=4),
    ],
    ids=str,
)  # fmt: skip
def test_a_divided_state_is_one_run(x64, geometry):
    require_same(geometry)


def test_a_divided_state_on_twice_as_many_devices_is_one_run(x64):
    require_same(Geometry(4, 4, fsdp=2))


def test_the_norm_is_that_of_all_leaves(x64):
    """Divided or whole, by the devices along one axis or both."""
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=shape) for name, shape in
            {"a": (8, 3), "b": (4,), "c": (3,), "d": (5, 4), "e": ()}.items()}  # fmt: skip
    wanted = np.sqrt(sum(np.sum(np.square(a)) for a in tree.values()))
    for shape in ((1, 4, 1), (2, 2, 1), (1, 2, 2)):
        devices = np.asarray(jax.devices()[:4]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("data", *fsdp.AXES))
        specs = jax.tree.map(lambda a: fsdp.spec(a.shape, shape[1] * shape[2]), tree)  # noqa: B023
        assert {len(spec) for spec in specs.values()} == {0, 1, 2}
        assert float(jax.jit(fsdp.norm(mesh, specs))(tree)) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("microbatch", "devices", "nbs"), [(2, 2, 16), (1, 4, 16), (2, 4, 16), (2, 4, 11), (1, 4, 7)]
)
def test_groups_on_several_devices_are_one_run(x64, microbatch, devices, nbs, engine):
    require_same(Geometry(microbatch, devices, engine), nbs=nbs)


def test_a_whole_batch_on_all_devices(x64):
    require_same(Geometry(4, 4), Geometry(16), group=16)


def test_the_check_notices_statistics_of_a_part_of_the_group(x64, monkeypatch):
    monkeypatch.setattr(batchnorm, "_over_group", lambda sums, *_: sums)
    reference = run_toy(Geometry(4))
    found = equivalence.differences(run_toy(Geometry(2, 2)), reference)
    assert found["gradient"] > 1e-3


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (
            (2, 3),
            "microbatch 2 on 3 devices would cut a group of 4.*take a multiple of 4, or change",
        ),
        ((3, 4), "take 1 or 2 or a multiple of 4"),
        (
            (3, 1),
            "microbatch 3 on 1 device .*take 1 or 2 or a multiple of 4, or change .* to bn_group 3",
        ),
        ((4, 4, "scan", 3), "fsdp 3 does not divide 4 devices: set it to 2 or 4, or 1"),
        ((4, 2, "multisteps", 2), "Set engine to 'scan'"),
    ],
)
def test_geometries_that_cannot_be(geometry, message):
    with pytest.raises(GeometryError, match=message):
        Window(Recipe(16, 4), Geometry(*geometry))


def test_more_devices_than_there_are():
    window = Window(Recipe(16, 4), Geometry(4, 64))
    with pytest.raises(GeometryError, match="asks for 64 devices, but JAX sees 4"):
        make_engine(toy.make_forward(), toy.make_rule(16), window)


def test_parts_and_groups_that_do_not_fit_each_other():
    with pytest.raises(GeometryError, match=r"lies on 4 devices.*set fsdp to 4"):
        Window(Recipe(16, 8), Geometry(2, 4, fsdp=2))
    text = str(Window(Recipe(16, 8), Geometry(2, 4, fsdp=4)))
    assert "fsdp 4" in text and "groups on 4 devices" in text


def test_a_leaf_is_cut_along_its_longest_axis_that_can_be():
    assert fsdp.spec((3, 3, 64, 128), 4) == jax.P(None, None, None, fsdp.AXES)
    assert fsdp.spec((3, 3, 64, 30), 4) == jax.P(None, None, fsdp.AXES)
    assert fsdp.spec((3, 3, 5), 4) == fsdp.spec((64, 64), 1) == jax.P()
