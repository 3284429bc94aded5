"""Saving and loading: exact round trips, and clear refusals."""

import json
import os
import pathlib
import subprocess
import sys
from collections import OrderedDict

import equinox as eqx
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import log_prob, new
from numpyro.distributions import constraints
from small import assert_same

import numpyro_flows as nf
from numpyro_flows.io import load, register, save
from numpyro_flows.nn import MLP
from numpyro_flows.transforms import Chain, DiagonalScale, NumPyroTransform, Standardized

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
KEY = jax.random.key(0)
SMALL = {"depth": 2, "hidden": (4,)}


@register
class Scaled(nf.FlowTransform):
    """A user's transform with every sort of field that is data."""

    log_scale: jax.Array
    part: nf.FlowTransform | None
    constants: nf.Fixed
    shape: tuple[int, ...] = eqx.field(static=True)
    bound: float = eqx.field(static=True, default=float("inf"))
    config: object = eqx.field(static=True, default=None)

    @property
    def event_shape(self):
        return self.shape

    def _forward_and_log_det(self, x, context=None):
        return x * jnp.exp(self.log_scale), jnp.broadcast_to(self.log_scale.sum(), x.shape[:-1])

    def _inverse_and_log_det(self, y, context=None):
        return y * jnp.exp(-self.log_scale), jnp.broadcast_to(-self.log_scale.sum(), y.shape[:-1])


class Unregistered(Scaled):
    pass


def scaled(config=None, cls=Scaled, **fields):
    fields = {"log_scale": jnp.array([0.5, -1.0]), "part": None, "constants": nf.Fixed(())} | fields
    return cls(shape=(2,), config=config, **fields)


def trained(flow):
    """The flow with parameters that are not those of the identity."""
    params, rest = nf.partition(flow)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nf.combine(jax.tree.unflatten(structure, leaves), rest)


def make(name):
    flow = new(nf.realnvp, 3, **SMALL)
    conditional = new(nf.realnvp, 3, context_dim=2, **SMALL)
    context = jax.random.normal(KEY, (4, 2))
    flows = {
        "nice": lambda: nf.nice(KEY, 3, **SMALL),
        "realnvp": lambda: flow,
        "positive": lambda: nf.realnvp(KEY, 3, support=constraints.positive, **SMALL),
        "simplex": lambda: nf.realnvp(KEY, 2, support=constraints.simplex, **SMALL),
        "interval": lambda: nf.nice(KEY, 3, support=constraints.interval(0.0, 2.0), **SMALL),
        "conditioned": lambda: conditional.condition(context),
        "conditioned_once": lambda: conditional.condition(context[0]),
        "expanded": lambda: flow.expand((2,)),
        "student": lambda: nf.realnvp(KEY, 3, base=dist.StudentT(3.0, jnp.arange(3.0)), **SMALL),
        "standardized": lambda: nf.FlowDistribution(
            flow.base_dist, Standardized(flow.transform, jnp.arange(3.0), 2.0 + jnp.arange(3.0))
        ),
        "angles": lambda: nf.nsf(
            KEY, 2, support=(constraints.circular, constraints.positive), num_bins=3, **SMALL
        ),
        "inverse": lambda: nf.FlowDistribution(flow.base_dist, flow.transform.inv),
        "user's": lambda: nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), scaled()),
    }
    return trained(flows[name]())


NAMES = [
    "nice",
    "realnvp",
    "positive",
    "simplex",
    "interval",
    "expanded",
    "student",
    "standardized",
    "angles",
    "inverse",
    "user's",
    "conditioned",
    "conditioned_once",
]


def round_trip(tmp_path, flow):
    save(tmp_path / "flow", flow)
    return load(tmp_path / "flow")


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "flow", nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), DiagonalScale(2)))
    return tmp_path / "flow"


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact(tmp_path, name):
    flow = make(name)
    loaded = round_trip(tmp_path, flow)
    assert_same(loaded, flow)
    assert loaded.support == flow.support or name == "interval"  # Its bounds are arrays.

    @jax.jit
    def evaluate(flow):
        x, log_prob = flow.sample_and_log_prob(KEY, (5,))
        return x, log_prob, flow.log_prob(x)

    for got, expected in zip(evaluate(loaded), evaluate(flow), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.smoke
def test_conditional_flow(tmp_path):
    flow = trained(new(nf.realnvp, 3, context_dim=2, **SMALL))
    loaded = round_trip(tmp_path, flow)
    assert_same(loaded, flow)
    assert loaded.context_dim == 2
    context, x = jnp.ones(2), jnp.ones(3)
    assert log_prob(loaded.condition(context), x) == log_prob(flow.condition(context), x)


def test_transform_alone(tmp_path):
    transform = make("positive").transform
    assert_same(round_trip(tmp_path, transform), transform)


def test_float64(tmp_path):
    with enable_x64(True):
        flow = make("user's")
        loaded = round_trip(tmp_path, flow)
        assert jax.tree.leaves(loaded)[0].dtype == jnp.float64
        assert_same(loaded, flow)
    with pytest.raises(ValueError, match=r'float64.*jax.config.update\("jax_enable_x64", True\)'):
        load(tmp_path / "flow")


def test_float32_file_stays_float32_under_x64(tmp_path):
    flow = make("realnvp")
    save(tmp_path / "flow", flow)
    with enable_x64(True):
        assert_same(load(tmp_path / "flow"), flow)


@pytest.mark.slow
def test_other_process(tmp_path):
    # NumPyro orders the fields of a distribution anew in each process.
    x = jnp.ones(3)
    flows = [make("student"), make("conditioned")]
    for i, flow in enumerate(flows):
        save(tmp_path / f"{i}", flow)
    code = (
        "import jax.numpy as jnp, sys\n"
        "from numpyro_flows.io import load\n"
        "for path in sys.argv[1:]:\n"
        "    print(load(path).log_prob(jnp.ones(3)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "0", tmp_path / "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [flow.log_prob(x).tolist() for flow in flows]


def test_every_kind_of_field(tmp_path):
    config = (
        [1, 2**70, -0.0, 1e-323, True, None, "naïve \ud800"],
        {"a.b": (0.1, float("-inf"))},
        OrderedDict({3: frozenset({"x"}), -1: ()}),
        constraints.real,
        constraints.independent(constraints.positive, 1),
    )
    fields = {
        "part": Chain(
            [DiagonalScale(2), scaled(), NumPyroTransform(dist.transforms.ExpTransform(), (2,))]
        ),
        "constants": nf.Fixed(
            {"a.b": jnp.ones(2, jnp.float16), "a": {"b": np.arange(3)}, "c": np.float32(0.1)}
        ),
    }
    transform = scaled(config, **fields)
    loaded = round_trip(tmp_path, transform)
    assert_same(loaded, transform)
    assert loaded.config == config
    assert [type(item) for item in loaded.config[0]] == [type(item) for item in config[0]]
    assert np.signbit(loaded.config[0][2])
    assert loaded.config[3] is constraints.real
    assert loaded.bound == float("inf")
    assert type(loaded.constants.value["a"]["b"]) is np.ndarray
    assert type(loaded.constants.value["c"]) is np.float32
    assert np.isnan(round_trip(tmp_path, scaled(bound=float("nan"))).bound)


def test_path_is_used_as_given(tmp_path):
    flow = make("realnvp")
    save(str(tmp_path / "flow.v1"), flow)
    save(tmp_path / "flow.v1", make("nice"))
    assert [file.name for file in tmp_path.iterdir()] == ["flow.v1"]
    assert_same(load(str(tmp_path / "flow.v1")), make("nice"))


def test_arrays_are_readable_without_the_package(path):
    np.testing.assert_array_equal(np.load(path)["base_dist.base_dist.loc"], np.zeros(2))


# Refusals to save.


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda: scaled(config=make), r"transform\.config holds .*make.*nf\.io\.register"),
        (
            lambda: Chain([DiagonalScale(2), scaled(cls=Unregistered)]),
            r"transform\.parts\[1\] holds",
        ),
        (
            lambda: scaled(constants=nf.Fixed({"a": [object()]})),
            r"constants\.value\['a'\]\[0\] holds",
        ),
        (lambda: scaled(jnp.float32), "named activation"),
        (
            lambda: scaled(log_scale=jnp.zeros(2, jnp.bfloat16)),
            r"log_scale holds.*not bfloat16; convert",
        ),
        (lambda: scaled(constants=nf.Fixed(KEY)), r"constants\.value holds.*not key<fry>"),
        (
            lambda: scaled(constants=nf.Fixed(np.ma.zeros(2))),
            r"constants\.value holds.*MaskedArray",
        ),
    ],
)
def test_save_refuses_what_is_no_data(tmp_path, transform, message):
    base = dist.Normal(jnp.zeros(2), 1.0)
    flow = nf.FlowDistribution(base, scaled())
    flow.transforms = [transform()]
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "flow", flow)
    assert not list(tmp_path.iterdir())


def test_save_names_the_field(tmp_path):
    flow = nf.realnvp(KEY, 3, **SMALL)
    mlp = flow.transform.layers.conditioner
    object.__setattr__(mlp, "activation", jnp.tanh)
    with pytest.raises(TypeError, match=r"transform\.layers\.conditioner\.activation holds .*tanh"):
        save(tmp_path / "flow", flow)
    assert not list(tmp_path.iterdir())


def test_save_refuses_tracers(tmp_path):
    def trace(flow):
        save(tmp_path / "flow", flow)
        return flow

    with pytest.raises(TypeError, match="outside of `jit`"):
        jax.jit(trace)(make("realnvp"))
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_distribution_that_is_not_numpyros(tmp_path):
    class Mine(dist.Normal):
        pass

    flow = nf.FlowDistribution(Mine(jnp.zeros(2), 1.0), DiagonalScale(2))
    with pytest.raises(
        TypeError, match=r"base_dist\.base_dist holds .*Mine.*numpyro.distributions"
    ):
        save(tmp_path / "flow", flow)


@pytest.mark.parametrize("value", [dist.Normal(0.0, 1.0), jnp.ones(2), "flow", [1]])
def test_save_refuses_other_objects(tmp_path, value):
    with pytest.raises(TypeError, match="expected a flow or a transform, got"):
        save(tmp_path / "flow", value)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, make("realnvp"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Registration.


def test_register_returns_the_class():
    assert register(Scaled) is Scaled
    assert register(MLP) is MLP


@pytest.mark.parametrize("value", [dict, dist.Normal, jax.nn.relu, scaled])
def test_register_refuses_what_is_no_module_class(value):
    with pytest.raises(TypeError, match="expected a subclass of equinox.Module"):
        register(value)


def test_register_refuses_name_clashes():
    for name in ("Scaled", "Coupling"):
        other = type(Scaled)(
            name, (eqx.Module,), {"__module__": __name__, "__qualname__": f"f.{name}"}
        )
        with pytest.raises(ValueError, match=f"unused class name, got '{name}'"):
            register(other)
    assert register(Scaled) is Scaled


def test_redefinition_replaces(tmp_path):
    save(tmp_path / "flow", scaled())
    namespace = {k: v for k, v in vars(Scaled).items() if k in ("__annotations__", "event_shape")}
    methods = nf.FlowTransform.__abstractmethods__ - {"event_shape"}
    namespace |= {name: lambda self, x, context=None: (x, x) for name in methods}
    namespace |= {"__module__": __name__, "__qualname__": "Scaled"}
    again = register(type(Scaled)("Scaled", (nf.FlowTransform,), namespace))
    try:
        assert type(load(tmp_path / "flow")) is again
        with pytest.raises(TypeError, match=r"holds.*nf\.io\.register"):
            save(tmp_path / "flow", scaled())
    finally:
        register(Scaled)
