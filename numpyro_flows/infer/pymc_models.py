"""Models of PyMC, and of what is built on it: fitted and sampled through their log density in JAX.

PyMC is imported where it is used; ``pip install 'numpyro_flows[pymc]'``. Its JAX part sets JAX to
float64 for the whole process.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro.infer import MCMC

from ..checks import check_key, check_size
from ..compilation import jit, split
from ..distribution import FlowDistribution
from .export import inference_data
from .fit import fit_guide
from .guide_flow import guide_flow
from .guides import AutoFlow
from .kernels import FlowNUTS
from .log_density_model import log_density_model


class _Translated:
    """A PyMC model as a NumPyro one over PyMC's unconstrained values.

    :ivar model: the NumPyro model.
    """

    def __init__(self, caller: str, model: Any):
        try:
            import pymc
            from pymc.sampling.jax import get_jaxified_graph
            from pymc.util import get_default_varnames
        except ImportError as error:
            raise ImportError(
                f"nf.{caller} needs PyMC: `pip install 'numpyro_flows[pymc]'`."
            ) from error
        if not isinstance(model, pymc.Model):
            raise TypeError(
                f"model: expected a `pymc.Model`, got {type(model).__name__}. A Bambi model has "
                "one as `model.backend.model` after `model.build()`."
            )
        values = model.value_vars
        if discrete := [var.name for var in values if var.dtype not in ("float32", "float64")]:
            raise ValueError(
                f"model: {', '.join(map(repr, discrete))} is discrete, and flows are continuous. "
                "Sum it out: `pymc.Mixture`, or `pymc_extras.marginalize`."
            )
        if not values:
            raise ValueError("model: it has no free variables, so there is nothing to infer.")
        start = model.initial_point()
        self._names = [var.name for var in values]
        self._outputs = list(get_default_varnames(model.unobserved_value_vars, False))
        density = get_jaxified_graph(inputs=values, outputs=[model.logp()])
        self._after = get_jaxified_graph(inputs=values, outputs=self._outputs)

        def log_density(point: dict[str, Array]) -> Array:
            return density(*(point[name] for name in self._names))[0]

        dtype = jax.numpy.result_type(float)
        example = {name: np.asarray(start[name], dtype) for name in self._names}
        self.model = log_density_model(log_density, example)
        self._observed = {
            var.name: np.asarray(model.rvs_to_values[var].data)
            for var in model.observed_RVs
            if hasattr(model.rvs_to_values[var], "data")
        }
        self._coords = {
            name: list(labels) for name, labels in model.coords.items() if labels is not None
        }
        self._dims = {name: list(dims) for name, dims in model.named_vars_to_dims.items()}

    def to_arviz(self, draws: dict[str, Array], stats: dict[str, Any], verdict: str) -> Any:
        """Draws of the values, ``(chains, n, *shape)``, as PyMC's own variables."""
        values = [draws[name] for name in self._names]
        found = jit(jax.vmap(jax.vmap(self._after)), once=True)(*values)
        posterior = {
            var.name: np.asarray(value) for var, value in zip(self._outputs, found, strict=True)
        }
        groups = {
            "posterior": posterior,
            "sample_stats": {name: np.asarray(value) for name, value in stats.items()},
            "observed_data": self._observed,
            "constant_data": {},
        }
        shapes = {name: value.ndim - 2 for name, value in posterior.items()}
        shapes |= {name: value.ndim for name, value in self._observed.items()}
        dims = {name: dims for name, dims in self._dims.items() if name in shapes and dims}
        used = {dim for each in dims.values() for dim in each}
        coords = {name: labels for name, labels in self._coords.items() if name in used}
        return inference_data(groups, {}, dims, coords, {"verdict": verdict})


def fit_pymc(
    model: Any,
    *,
    key: Array | None = None,
    num_samples: int = 4000,
    flow: Callable[..., FlowDistribution] = guide_flow,
    progress_bar: bool = True,
    **options: Any,
) -> Any:
    """Fit a flow guide to a PyMC model; draws for ArviZ.

    ``nf.fit_guide`` of an ``nf.AutoFlow`` over PyMC's unconstrained values, by PyMC's own log
    density compiled to JAX. A warning has the verdict if the draws cannot be relied on. PyMC sets
    JAX to float64 for the whole process.

    :param model: a ``pymc.Model`` without discrete free variables.
    :param key: ``jax.random.key``; that of seed 0 by default.
    :param num_samples: draws.
    :param flow: a recipe, as for ``nf.AutoFlow``.
    :param progress_bar: whether training shows one.
    :param options: of ``nf.fit_guide``.
    :return: ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1: PyMC's variables and
        deterministics by their names, dimensions and coordinates, in one chain; the verdict among
        the attributes of the posterior.
    :raises ImportError: without PyMC.
    :raises TypeError: for what is no ``pymc.Model``.
    :raises ValueError: for a model with discrete free variables, or none.

    >>> import pymc as pm, numpyro_flows as nf  # doctest: +SKIP
    >>> with pm.Model() as model:  # doctest: +SKIP
    ...     x = pm.Normal("x", 1.0, 2.0)
    >>> nf.fit_pymc(model).posterior["x"].shape  # doctest: +SKIP
    (1, 4000)
    """
    check_size("num_samples", num_samples)
    translated = _Translated("fit_pymc", model)
    fit_key, draw_key, *_ = split(jax.random.key(0) if key is None else check_key(key), 4)
    guide = AutoFlow(translated.model, flow)
    fitted = fit_guide(fit_key, guide, progress_bar=progress_bar, **options)
    if not fitted.trusted:
        warnings.warn(f"nf.fit_pymc: {fitted.verdict}", stacklevel=2)
    draws = fitted.sample(draw_key, (num_samples,))
    return translated.to_arviz(
        {name: value[None] for name, value in draws.items()}, {}, fitted.verdict
    )


def sample_pymc(
    model: Any,
    *,
    key: Array | None = None,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    progress_bar: bool = True,
    **options: Any,
) -> Any:
    """Sample a PyMC model with ``nf.FlowNUTS``; draws for ArviZ.

    A warning has the verdict if the draws cannot be relied on. PyMC sets JAX to float64 for the
    whole process.

    :param model: a ``pymc.Model`` without discrete free variables.
    :param key: ``jax.random.key``; that of seed 0 by default.
    :param num_warmup: iterations of warm-up of each chain.
    :param num_samples: draws of each chain.
    :param num_chains: chains, which are vectorised.
    :param progress_bar: whether training shows one.
    :param options: of ``nf.FlowNUTS``.
    :return: as :func:`fit_pymc`, with ``sample_stats`` of each draw.
    :raises ImportError: without PyMC.
    :raises TypeError: for what is no ``pymc.Model``.
    :raises ValueError: for a model with discrete free variables, or none.

    >>> import pymc as pm, numpyro_flows as nf  # doctest: +SKIP
    >>> with pm.Model() as model:  # doctest: +SKIP
    ...     x = pm.Normal("x", 1.0, 2.0)
    >>> nf.sample_pymc(model).posterior["x"].shape  # doctest: +SKIP
    (4, 1000)
    """
    translated = _Translated("sample_pymc", model)
    kernel = FlowNUTS(translated.model, progress_bar=progress_bar, **options)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=check_size("num_chains", num_chains),
        chain_method="vectorized",
        progress_bar=False,
    )
    fields = ("accept_prob", "adapt_state.step_size")
    key = jax.random.key(0) if key is None else check_key(key)
    mcmc.run(key, extra_fields=fields)
    run = kernel.report(mcmc).run
    if run is not None and not run.trusted:
        warnings.warn(f"nf.sample_pymc: {run.verdict}", stacklevel=2)
    extra = mcmc.get_extra_fields(group_by_chain=True)
    stats = {
        "diverging": extra["diverging"],
        "energy": extra["energy"],
        "n_steps": extra["num_steps"],
        "acceptance_rate": extra["accept_prob"],
        "step_size": extra["adapt_state.step_size"],
    }
    verdict = "" if run is None else run.verdict
    return translated.to_arviz(mcmc.get_samples(group_by_chain=True), stats, verdict)
