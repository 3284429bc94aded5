"""Every concrete transform keeps the contract, judged by autodiff, in float32 and float64."""

import importlib
import inspect
import itertools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ELSEWHERE
from numpyro.distributions.transforms import AffineTransform, ExpTransform
from small import points, transform

import numpyro_flows as nf
from numpyro_flows.diagnostics import TransformError


def concrete_transforms():
    for module in pkgutil.walk_packages(nf.__path__, "numpyro_flows."):
        importlib.import_module(module.name)

    def below(cls):
        for subclass in cls.__subclasses__():
            yield subclass
            yield from below(subclass)

    return [
        cls
        for cls in below(nf.FlowTransform)
        if cls.__module__.startswith("numpyro_flows.")
        and not (inspect.isabstract(cls) or cls.__name__.startswith("_"))
    ]


@pytest.mark.parametrize("cls", concrete_transforms(), ids=lambda cls: cls.__name__)
def test_every_transform_has_a_case(cls):
    assert cls in CASES or cls in ELSEWHERE, (
        f"{cls.__name__} has no contract test: add an entry to CASES in tests/cases.py, a dict "
        "from labels to functions that return (transform, x, context)."
    )


def contract_cases():
    """The first case of each class in full and, in float32, quickly; the others quickly.

    All else is slow: the others in full, float32 in full, and all further cases of what takes
    minutes to compile.
    """
    heavy = (nf.transforms.Continuous, nf.transforms.MultiScale)
    for cls, entries in CASES.items():
        for i, label in enumerate(entries):
            usual = {("quick", "float64")} if i else {("full", "float64"), ("quick", "float32")}
            for depth, dtype in itertools.product(("full", "quick"), ("float64", "float32")):
                covered = depth == "quick" and dtype == "float64" and not i
                if not covered:  # by the full check
                    slow = (depth, dtype) not in usual or (i and cls in heavy)
                    marks = [pytest.mark.slow] if slow else []
                    yield pytest.param(cls, label, depth, dtype, marks=marks)


@pytest.mark.parametrize(
    ("cls", "label", "depth", "dtype"),
    list(contract_cases()),
    indirect=["dtype"],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_contract(cls, label, depth, dtype):
    tested, x, context = CASES[cls][label]()
    assert type(tested) is cls
    assert x.dtype == dtype
    report = nf.check_transform(tested, x, context, quick=depth == "quick")
    assert report.passed
    assert "inverse(forward(x)) = x" in str(report)
    assert ("log-det = autodiff" in str(report)) == (depth == "full" and judged(tested))


def judged(tested):
    """Whether autodiff judges the log-determinant: not on manifolds."""
    return np.prod(tested.event_shape) == np.prod(tested.out_shape)


# check_transform finds what is broken. Each of these is wrong in one way.


class Scale(nf.FlowTransform):
    """y = s x, right; the classes below break one thing each."""

    log_scale: jax.Array

    @property
    def event_shape(self):
        return (2,)

    def _forward_and_log_det(self, x, context=None):
        return x * jnp.exp(self.log_scale), jnp.broadcast_to(self.log_scale.sum(), x.shape[:-1])

    def _inverse_and_log_det(self, y, context=None):
        return y * jnp.exp(-self.log_scale), -jnp.broadcast_to(self.log_scale.sum(), y.shape[:-1])


class WrongLogDet(Scale):
    def _forward_and_log_det(self, x, context=None):
        y, log_det = Scale._forward_and_log_det(self, x)
        return y, 2 * log_det

    def _inverse_and_log_det(self, y, context=None):
        x, log_det = Scale._inverse_and_log_det(self, y)
        return x, 2 * log_det


class WrongInverse(Scale):
    def _inverse_and_log_det(self, y, context=None):
        x, log_det = Scale._inverse_and_log_det(self, y)
        return x + 0.01, log_det


class WrongSign(Scale):
    def _inverse_and_log_det(self, y, context=None):
        x, log_det = Scale._inverse_and_log_det(self, y)
        return x, -log_det


class MixesRows(Scale):
    def _forward_and_log_det(self, x, context=None):
        y, log_det = Scale._forward_and_log_det(self, x)
        return y, log_det + (x - x.reshape(-1, 2).mean(0)).sum(-1) * 0.01


class NaNGradient(Scale):
    def _forward_and_log_det(self, x, context=None):
        y, log_det = Scale._forward_and_log_det(self, x)
        return y + jnp.where(x > jnp.inf, jnp.sqrt(-jnp.abs(x) - 1), 0.0), log_det


class ScalarLogDet(Scale):
    def _forward_and_log_det(self, x, context=None):
        y, log_det = Scale._forward_and_log_det(self, x)
        return y, log_det.sum()


class HalfPrecision(Scale):
    def _forward_and_log_det(self, x, context=None):
        y, log_det = Scale._forward_and_log_det(self, x)
        return y.astype(jnp.float16), log_det


class Raises(Scale):
    def _inverse_and_log_det(self, y, context=None):
        raise NotImplementedError("no inverse")


def test_a_right_transform_passes():
    assert nf.check_transform(Scale(jnp.array([0.5, -0.2])), points(2)).passed


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (WrongLogDet, "log-det = autodiff"),
        (WrongInverse, "inverse(forward(x)) = x"),
        (WrongSign, "inverse log-det = -log-det"),
        (MixesRows, "forward of one row: log-det"),
        (NaNGradient, "forward: gradients are finite"),
        (ScalarLogDet, "shape of log-det"),
        (HalfPrecision, "dtype kept"),
        (Raises, "no inverse"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_transform_is_found(cls, line):
    with pytest.raises(TransformError) as error:
        nf.check_transform(cls(jnp.array([0.5, -0.2])), points(2))
    failed = [text for text in str(error.value).splitlines() if "FAIL" in text]
    assert any(line in text for text in failed), failed


def test_leaves_must_be_floating_arrays():
    with pytest.raises(TransformError, match=r"FAIL  leaves.*log_scale \(float\)"):
        nf.check_transform(Scale(0.5), points(2))


def test_numpyro_transforms_are_checked_too():
    assert nf.check_transform(ExpTransform(), points(3)).passed
    assert nf.check_transform(AffineTransform(1.0, 2.0), points(1)).passed

    class Wrong(ExpTransform):
        def log_abs_det_jacobian(self, x, y, intermediates=None):
            return x + 1

    with pytest.raises(TransformError, match=r"FAIL  log-det = autodiff"):
        nf.check_transform(Wrong(), points(3))


def test_reverse_mode_serves_where_forward_mode_does_not_exist():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    class Doubles(Scale):
        def _forward_and_log_det(self, x, context=None):
            y, log_det = Scale._forward_and_log_det(self, x)
            return double(y), log_det + 2 * np.log(2)

        def _inverse_and_log_det(self, y, context=None):
            x, log_det = Scale._inverse_and_log_det(self, y / 2)
            return x, log_det - 2 * np.log(2)

    assert nf.check_transform(Doubles(jnp.array([0.5, -0.2])), points(2)).passed


def test_bad_input():
    t = transform(nf.realnvp, 3, context_dim=2)
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 3\), got \(6, 2\)"):
        nf.check_transform(t, points(2), points(2))
    with pytest.raises(ValueError, match="got no context"):
        nf.check_transform(t, points(3))
    with pytest.raises(ValueError, match="n at least 2"):
        nf.check_transform(t, points(3)[0], points(2))
    with pytest.raises(TypeError, match="floating-point"):
        nf.check_transform(t, np.ones((4, 3), int), points(2))
    with pytest.raises(TypeError, match="Expected a transform"):
        nf.check_transform(lambda x: x, points(3))
