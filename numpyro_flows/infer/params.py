"""Flows with learnable or random parameters inside NumPyro models."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import numpyro
from jax import Array
from numpyro.distributions import Distribution, ExpandedDistribution, Independent
from numpyro.infer.autoguide import AutoGuide

from ..augmented import AugmentedFlow
from ..distribution import FlowDistribution, combine, leaf_names, partition

Prior: TypeAlias = (
    Distribution | Mapping[str, Distribution] | Callable[[str, tuple[int, ...]], Distribution]
)


_Flow = TypeVar("_Flow", FlowDistribution, AugmentedFlow)


def _check_flow(flow: object) -> FlowDistribution:
    if not isinstance(flow, FlowDistribution):
        raise TypeError(
            f"flow: expected a FlowDistribution, got {type(flow).__name__}. Build one with a "
            "recipe, for example `nf.realnvp(jax.random.key(0), dim)`."
        )
    return flow


def _train_base(name: str, base: Distribution) -> Distribution:
    """``base`` with its arguments as NumPyro parameters under their own constraints."""
    base = copy.copy(base)
    if isinstance(base, Independent | ExpandedDistribution):
        base.base_dist = _train_base(name, base.base_dist)
        return base
    for arg, constraint in base.arg_constraints.items():
        value = base.__dict__.get(arg)
        if eqx.is_inexact_array(value):
            site = numpyro.param(f"{name}$base.{arg}", value, constraint=constraint)
            setattr(base, arg, site)
    return base


def flow_module(name: str, flow: _Flow, *, train_base: bool = False) -> _Flow:
    """Declare a flow whose parameters are learned with the model's, as by ``eqx_module``.

    The parameters are one ``numpyro.param`` site ``name$params``, with the first half of
    ``nf.partition(flow)`` as its value. Declare the flow outside ``numpyro.contrib.control_flow``
    loops and use it inside them.

    :param name: name of the module in the model.
    :param flow: the flow, conditional or not, with its initial parameters. An augmented one needs
        fresh noise in each step: ``flow_module(...).with_probe(numpyro.prng_key())``.
    :param train_base: whether the base distribution's arguments are learned too, each as a site
        ``name$base.argument`` under that argument's own constraint; not for augmented flows.
    :return: the flow with the parameters of the current run.
    :raises TypeError: if ``flow`` is not a flow.

    >>> import jax, numpyro, numpyro_flows as nf
    >>> flow = nf.realnvp(jax.random.key(0), 2)
    >>> def model(x):
    ...     numpyro.sample("x", nf.flow_module("flow", flow).expand((len(x),)), obs=x)
    """
    if train_base or not isinstance(flow, AugmentedFlow):
        _check_flow(flow)
    params, rest = partition(flow)
    # A flow is callable, and `param` calls what is callable; hence the lambda.
    flow = combine(numpyro.param(f"{name}$params", lambda _: params), rest)
    if train_base:
        flow = flow.with_parts(base_dist=_train_base(name, flow.base_dist))
    return flow


def random_flow_module(name: str, flow: FlowDistribution, prior: Prior) -> FlowDistribution:
    """Declare a flow with priors over its parameters, for Bayesian inference on the flow itself.

    Each array of parameters is one ``numpyro.sample`` site ``name/array``, for example
    ``flow/layers.conditioner.weights.0``. Layers of one structure share an array, with the layer
    as its first axis; weights have shape ``(layers, out, in)``.

    :param name: name of the module in the model.
    :param flow: the flow, conditional or not.
    :param prior: one distribution for all arrays, a mapping from array names (arrays not named
        stay learnable, as ``numpyro.param``), or a function of name and shape. A distribution is
        expanded to the array's shape.
    :return: the flow with the parameters of the current run.
    :raises TypeError: if ``flow`` is not a ``FlowDistribution``.
    :raises ValueError: if the mapping names an array that does not exist.

    >>> import jax, numpyro.distributions as dist, numpyro_flows as nf
    >>> flow = nf.realnvp(jax.random.key(0), 2, depth=2, hidden=(8,))
    >>> def model():
    ...     nf.random_flow_module("flow", flow, dist.Normal(0.0, 0.3))
    """
    params, rest = partition(_check_flow(flow).transform)
    arrays, structure = jax.tree.flatten(params)
    names = leaf_names(params)
    if isinstance(prior, Mapping) and not prior.keys() <= set(names):
        raise ValueError(
            f"prior: no parameters named {sorted(prior.keys() - set(names))}; "
            f"this flow has {names}."
        )

    def site(array_name: str, array: Array) -> Any:
        if isinstance(prior, Mapping):
            distribution = prior.get(array_name)
        elif isinstance(prior, Distribution):
            distribution = prior
        else:
            distribution = prior(array_name, array.shape)
        full_name = f"{name}/{array_name}"
        if distribution is None:
            return numpyro.param(full_name, array)
        batch_shape = array.shape[: array.ndim - distribution.event_dim]
        return numpyro.sample(full_name, distribution.expand(batch_shape).to_event())

    sites = [site(*pair) for pair in zip(names, arrays, strict=True)]
    transform = combine(jax.tree.unflatten(structure, sites), rest)
    return flow.with_parts(transform=transform)


def model_params(guide: AutoGuide, params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``params`` that belong to ``param`` sites of the guide's model, not to the guide."""
    return {
        name: value
        for name, value in params.items()
        if guide.prototype_trace.get(name, {}).get("type") == "param"
    }
