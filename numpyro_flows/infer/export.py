"""A fitted guide as ArviZ inference data: what ArviZ and its versions ask for is in this file."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import Unit
from numpyro.infer.autoguide import AutoGuide

from ..checks import check_key, check_size
from ..compilation import jit, split
from .density import latent_of, unblocked, whole_plates
from .importance import weighted_draws
from .latent_space import Sites, evaluate
from .maps import Weighted
from .traced import Traced, traced_at

#: Axes that every group of draws begins with.
SAMPLE = ("chain", "draw")


def to_arviz(
    guide: AutoGuide,
    params: dict[str, Any],
    *args: Any,
    key: Array | None = None,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draws of a guide for ArviZ, with all that its tables, plots and comparisons read.

    The groups are those of ``arviz.from_numpyro``, with one chain:

    - ``posterior``: latent and deterministic sites;
    - ``sample_stats``: ``lp``, the log joint density, ``log_q``, that of the guide, and
      ``log_weight``, their difference, each in constrained space;
    - ``log_likelihood`` of the observed sites, unless a site that the guide does not draw
      (``handlers.block``) has to be known for it;
    - ``posterior_predictive``, ``observed_data``: observed sites. Entries of an observed value
      that the model fills with latent sites are missing data, NaN in ``observed_data``;
    - ``prior``, ``prior_predictive``, unless a prior is improper. Factors do not enter;
    - ``constant_data``, as given.

    Dimensions bear the names of plates, and of ``infer={"event_dims": names}`` for the axes of an
    event; others are called ``theta_dim_0``, as in ArviZ. A subsampled plate has all its rows if
    the arguments have, else those of the arguments.

    :param guide: an automatic guide that has been set up.
    :param params: its trained parameters.
    :param args: arguments of the model, with the observations; so are the other keyword arguments.
    :param key: ``jax.random.key``; that of seed 0 by default.
    :param num_samples: number of draws of posterior and prior.
    :param coords: labels along dimensions, ``{"school": names}``.
    :param dims: names of a site's axes, all of them, in the place of those of plates:
        ``{"beta": ["feature"]}``; None leaves one as it is.
    :param constant_data: arrays that are no sites, by name, such as covariates.
    :return: ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.
    :raises ValueError: for a guide that was not set up; for ``dims`` of no site or with another
        number of axes; for ``coords`` of no dimension or of another length.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with numpyro.plate("school", len(y)):
    ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide, y = nf.AutoFlow(model, init="location"), jnp.array([0.3, 1.2])
    >>> fitted = nf.fit_guide(jax.random.key(0), guide, y, num_steps=100, progress_bar=False)
    >>> data = nf.to_arviz(guide, fitted.params, y, coords={"school": ["A", "B"]})
    >>> dict(data.log_likelihood["y"].sizes)
    {'chain': 1, 'draw': 1000, 'school': 2}
    """
    key = jax.random.key(0) if key is None else check_key(key)
    check_size("num_samples", num_samples)
    draw_key, predict_key, *_ = split(key, 4)
    drawn, model = _drawn(draw_key, guide, params, args, kwargs, num_samples)
    known = _Known(model, drawn.sites, params, args, kwargs)
    sampled = {
        "posterior": drawn.sites,
        "sample_stats": {"lp": drawn.log_p, "log_q": drawn.log_q},
        **_predictions(predict_key, known, drawn.sites, params, args, kwargs),
    }
    groups = {
        group: {name: np.asarray(value)[None] for name, value in sites.items()}
        for group, sites in sampled.items()
    }
    stats = groups["sample_stats"]
    stats["log_weight"] = stats["lp"] - stats["log_q"]
    groups["observed_data"] = known.observed
    groups["constant_data"] = {k: np.asarray(v) for k, v in (constant_data or {}).items()}
    return inference_data(groups, known.axes, dims or {}, coords or {})


def _drawn(
    key: Array,
    guide: AutoGuide,
    params: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
    num_samples: int,
) -> tuple[Weighted, Callable]:
    """Draws, and the model, with all rows of subsampled plates if the arguments have them."""
    model = unblocked(guide.model)
    try:
        found = weighted_draws(key, guide, params, args, kwargs, num_samples, whole=True)
    except (TypeError, ValueError):  # rows of a batch do not fit a whole plate
        return weighted_draws(key, guide, params, args, kwargs, num_samples), model
    return found, whole_plates(model)


class _Known:
    """What a run of the model says: its sites, observed values, and names of their axes.

    :ivar model: the model, with the same rows of subsampled plates in each run.
    :ivar latent: names of its latent sites.
    :ivar observed: values of the observed sites; factors are none.
    :ivar axes: names of the axes of each site by plates and ``event_dims``, None for others.
    """

    def __init__(
        self,
        model: Callable,
        draws: Sites,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ):
        def run(arguments: Any, latent: Sites) -> tuple[Sites, Sites]:
            trace = _trace(model, jax.random.key(0), params | latent, *arguments)
            self.latent = latent_of(trace).keys()
            self.axes = {
                name: _axes_of(site)
                for name, site in trace.items()
                if site["type"] in ("sample", "deterministic")
            }
            observed = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "sample"
                and site["is_observed"]
                and not isinstance(site["fn"], Unit)
            }
            rows = {name: site["value"] for name, site in trace.items() if site["type"] == "plate"}
            return observed, rows

        # What is NaN in the result comes from latent sites: it is no datum.
        unknown = {
            name: np.full(draw.shape[1:], np.nan, draw.dtype)
            for name, draw in draws.items()
            if jnp.issubdtype(draw.dtype, jnp.floating)
        }
        observed, rows = evaluate(traced_at(run, (args, kwargs), unknown), unknown)
        self.observed = {name: np.asarray(value) for name, value in observed.items()}
        self.model = handlers.substitute(model, data=rows)


def _trace(
    model: Callable, key: Array, values: dict[str, Any], args: tuple, kwargs: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """A run of the model with these values of ``sample`` and ``param`` sites."""

    def value_of(site: dict[str, Any]) -> Any:
        return values.get(site["name"]) if site["type"] in ("sample", "param") else None

    with handlers.block():
        inner = handlers.substitute(handlers.seed(model, key), substitute_fn=value_of)
        return handlers.trace(inner).get_trace(*args, **kwargs)


def _axes_of(site: dict[str, Any]) -> tuple[str | None, ...]:
    """Names of the axes of a site's value by plates and ``event_dims``; None where there is none.

    A deterministic site does not say which axes are a batch. They are taken to come first, and
    an axis to be a plate's if it is as long.
    """
    shape, frames = jnp.shape(site["value"]), site["cond_indep_stack"]
    names: list[str | None] = [None] * len(shape)
    if site["type"] == "sample":
        num_batch = len(shape) - site["fn"].event_dim
    else:
        num_batch = min(len(shape), max((-frame.dim for frame in frames), default=0))
    for frame in frames:
        axis = num_batch + frame.dim
        if axis >= 0 and shape[axis] == frame.size:
            names[axis] = frame.name
    event = site.get("infer", {}).get("event_dims", ())
    names[num_batch:] = (*event, *names[num_batch + len(event) :])
    return tuple(names[: len(shape)])


def _predictions(
    key: Array,
    known: _Known,
    draws: Sites,
    params: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, Sites]:
    """Log likelihood and predictions at draws of the posterior, and as many draws of the prior."""
    free = handlers.uncondition(known.model)
    latent = {name: draw for name, draw in draws.items() if name in known.latent}

    def after(arguments: Any, key: Array, latent: Sites) -> dict[str, Sites]:
        trace = _trace(free, key, params | latent, *arguments)
        found = {"posterior_predictive": {name: trace[name]["value"] for name in known.observed}}
        if latent.keys() == known.latent:
            trace = _trace(known.model, key, params | latent, *arguments)
            sites = {name: trace[name] for name in known.observed}
            found["log_likelihood"] = {
                name: site["fn"].log_prob(site["value"]) for name, site in sites.items()
            }
        return found

    def before(arguments: Any, key: Array, latent: Sites) -> dict[str, Sites]:
        trace = _trace(free, key, params, *arguments)
        return {
            "prior": {name: trace[name]["value"] for name in draws},
            "prior_predictive": {name: trace[name]["value"] for name in known.observed},
        }

    one = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in latent.items()}
    runs = [traced_at(after, (args, kwargs), key, one)]
    with contextlib.suppress(NotImplementedError):  # improper priors cannot be drawn from
        runs.append(traced_at(before, (args, kwargs), key, one))
    return _each(runs, key, latent)


@jit(once=True)
def _each(runs: list[Traced], key: Array, latent: Sites) -> dict[str, Sites]:
    num_samples = len(jax.tree.leaves(latent)[0])

    def one(given: tuple[Array, Sites]) -> dict[str, Sites]:
        key, latent = given
        keys = jax.random.split(key, len(runs))
        found: dict[str, Sites] = {}
        for run, each in zip(runs, keys, strict=True):
            found |= run(each, latent)
        return found

    return jax.lax.map(one, (jax.random.split(key, num_samples), latent))


def inference_data(
    groups: dict[str, dict[str, np.ndarray]],
    axes: Mapping[str, Sequence[str | None]],
    dims: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Sequence[Any]],
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """The groups as labelled arrays, in the form that the ArviZ at hand has.

    :param groups: arrays by group and name; those of draws are ``(chains, n, *shape)``.
    :param axes: names of axes by site, as plates have them.
    :param dims: names of axes by site, as given.
    :param coords: labels along dimensions.
    :param attributes: of each group, beside the library's name.
    """
    import arviz
    import xarray

    names = _dimensions(groups, axes, dims, coords)
    data: dict[str, Any] = {}
    for group, values in groups.items():
        sample = () if group.endswith("_data") else SAMPLE
        variables: dict[str, Any] = {}
        labels: dict[str, Any] = {}
        for name, value in values.items():
            # A log likelihood has no axes of events.
            own = (*sample, *names.get(name, ()))[: value.ndim]
            variables[name] = (own, value)
            labels |= {
                dim: coords.get(dim, np.arange(n)) for dim, n in zip(own, value.shape, strict=True)
            }
        if variables:
            named = {"inference_library": "numpyro_flows", **(attributes or {})}
            data[group] = xarray.Dataset(variables, labels, named)
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(**data)
    return xarray.DataTree.from_dict(data)


def _dimensions(
    groups: dict[str, dict[str, np.ndarray]],
    axes: Mapping[str, Sequence[str | None]],
    dims: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Sequence[Any]],
) -> dict[str, tuple[str, ...]]:
    """Names of the axes of sites and constant data, checked against each other."""
    shapes = {name: value.shape[len(SAMPLE) :] for name, value in groups["posterior"].items()}
    shapes |= {name: value.shape for name, value in groups["observed_data"].items()}
    for name, value in groups["constant_data"].items():
        if name in shapes:
            raise ValueError(f"constant_data: {name!r} is a site of the model.")
        shapes[name] = value.shape
    if unknown := sorted(dims.keys() - shapes.keys()):
        raise ValueError(f"dims: expected names among {sorted(shapes)}, got {unknown}.")
    names: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        given = dims.get(name, (None,) * len(shape))
        if isinstance(given, str) or len(given) != len(shape):
            raise ValueError(
                f"dims: expected a list of {len(shape)} names for {name!r}, one for each axis of "
                f"{shape}, got {given!r}."
            )
        names[name] = tuple(
            mine or own or f"{name}_dim_{i}"
            for i, (mine, own) in enumerate(
                itertools.zip_longest(given, axes.get(name, (None,) * len(shape)))
            )
        )
        for dim, size in zip(names[name], shape, strict=True):
            if dim in (*SAMPLE, *shapes) or names[name].count(dim) > 1:
                raise ValueError(
                    f"The dimension {dim!r} of {name!r} has the name of another one or of a site. "
                    f"Name it otherwise: `dims={{{name!r}: [...]}}`."
                )
            other, first = sizes.setdefault(dim, (size, name))
            if size != other:
                raise ValueError(
                    f"The dimension {dim!r} has {other} entries in {first!r} and {size} in "
                    f"{name!r}. Name one of them otherwise: `dims={{{name!r}: [...]}}`."
                )
    for dim, labels in coords.items():
        if dim not in sizes:
            raise ValueError(f"coords: expected dimensions among {sorted(sizes)}, got {dim!r}.")
        size, name = sizes[dim]
        if len(labels) != size:
            raise ValueError(
                f"coords: expected {size} labels for {dim!r}, a dimension of {name!r}, got "
                f"{len(labels)}."
            )
    return names
