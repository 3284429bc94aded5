"""The three programs of each library that ``peers.py`` compares: step, log_prob and sample."""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import numpyro_flows as nf

OPTIMIZER = optax.adam(1e-3)


class Program:
    """A jitted function of ``args``; the first ``carried`` outputs are the next call's first."""

    def __init__(self, function, *args, carried: int = 0, lower=None):
        self.function, self.args, self.carried = function, list(args), carried
        self.lower = lower or function.lower

    def compile(self) -> float:
        """Seconds to trace, lower and compile."""
        jax.clear_caches()
        start = time.perf_counter()
        self.lower(*self.args).compile()
        return time.perf_counter() - start

    def run(self, calls: int) -> float:
        """Seconds per call."""
        start = time.perf_counter()
        for _ in range(calls):
            output = jax.block_until_ready(self.function(*self.args))
            if self.carried:
                self.args[: self.carried] = output[: self.carried]
        seconds = (time.perf_counter() - start) / calls
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output)):
            raise FloatingPointError("A program returned values that are not finite.")
        return seconds


Programs = dict[str, dict[str, Program]]  # by name and variant


def shake(params):
    flat, unravel = ravel_pytree(params)
    return unravel(flat + 0.05 * jax.random.normal(jax.random.key(2), flat.shape))


def flow_programs(params, rest, options) -> dict[str, Program]:
    """The three programs of any JAX flow with ``log_prob`` and ``sample``, split in two."""
    params, x = shake(params), jax.random.normal(jax.random.key(1), (options.batch, options.dim))

    def log_prob(params, x):
        return eqx.combine(params, rest).log_prob(x)

    def sample(params, key):
        return eqx.combine(params, rest).sample(key, (options.batch,))

    def step(params, state, x):
        loss, grads = jax.value_and_grad(lambda params: -log_prob(params, x).mean())(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return {
        "train step": Program(jax.jit(step), params, OPTIMIZER.init(params), x, carried=2),
        "log_prob": Program(jax.jit(log_prob), params, x),
        "sample": Program(jax.jit(sample), params, jax.random.key(3)),
    }


def our_programs(flow: nf.FlowDistribution, options) -> Programs:
    return {name: {"": p} for name, p in flow_programs(*nf.partition(flow), options).items()}


def flowjax_programs(build: Callable[..., Any], options, sides=(True, False)) -> Programs:
    """Programs of the flow that ``build(invert=...)`` makes, on each of the sides."""
    import paramax
    from flowjax.train.losses import MaximumLikelihoodLoss
    from flowjax.train.train_utils import step

    loss = MaximumLikelihoodLoss()

    def own(step, static, params, state, x):
        return step(params, static, x, optimizer=OPTIMIZER, opt_state=state, loss_fn=loss)

    programs: Programs = {"train step": {}, "log_prob": {}, "sample": {}}
    for invert in sides:
        params, static = eqx.partition(  # as flowjax.train.fit_to_data does
            build(invert=invert),
            eqx.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
        for name, program in flow_programs(params, static, options).items():
            programs[name][f"invert={invert}"] = program
        args = programs["train step"][f"invert={invert}"].args
        programs["train step"][f"invert={invert} own step"] = Program(
            partial(own, step, static), *args, carried=2, lower=partial(own, step.lower, static)
        )
    return programs


def ours(recipe: Callable[..., nf.FlowDistribution], *names: str, **config) -> Any:
    """Builder of our programs; ``names`` are the options that the recipe takes."""

    def build(options) -> Programs:
        sizes = {name: getattr(options, name) for name in names}
        return our_programs(recipe(jax.random.key(0), options.dim, **sizes, **config), options)

    return build


def flowjax_coupling(options, spline: bool = False) -> Programs:
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    # flowjax counts the inner knots: one fewer than there are bins.
    transformer = (
        RationalQuadraticSpline(knots=options.num_bins - 1, interval=4) if spline else None
    )
    build = partial(
        coupling_flow,
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(options.dim)),
        transformer=transformer,
        flow_layers=options.depth,
        nn_width=options.hidden[0],
        nn_depth=len(options.hidden),
    )
    return flowjax_programs(build, options)


def flowjax_maf(options) -> Programs:
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    build = partial(
        masked_autoregressive_flow,
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(options.dim)),
        flow_layers=options.depth,
        nn_width=options.hidden[0],
        nn_depth=len(options.hidden),
    )
    return flowjax_programs(build, options, sides=(True,))


def flowjax_bnaf(options) -> Programs:
    from flowjax.distributions import Normal
    from flowjax.flows import block_neural_autoregressive_flow

    build = partial(
        block_neural_autoregressive_flow,
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(options.dim)),
        flow_layers=options.depth,
        nn_depth=len(options.hidden_factors),
        nn_block_dim=options.hidden_factors[0],
    )
    return flowjax_programs(build, options, sides=(True,))


def numpyro_programs(build: Callable[[Any, Any], Any], init: Callable, options) -> Programs:
    """Programs of NumPyro's own transforms: ``build(params)`` is a distribution."""

    class Flow:
        def __init__(self, params):
            self.params = params

        def log_prob(self, x):
            return build(self.params).log_prob(x)

        def sample(self, key, shape):
            return build(self.params).sample(key, shape)

    jax.tree_util.register_pytree_node(Flow, lambda f: ((f.params,), None), lambda _, c: Flow(*c))
    split = eqx.partition(Flow(init(jax.random.key(0))), eqx.is_inexact_array)
    programs = flow_programs(*split, options)
    return {name: {"": program} for name, program in programs.items()}


def numpyro_maf(options) -> Programs:
    """One distribution over unrolled layers: NumPyro composes transforms in a list."""
    import numpyro.distributions as dist
    from numpyro.distributions.flows import InverseAutoregressiveTransform
    from numpyro.distributions.transforms import PermuteTransform
    from numpyro.nn import AutoregressiveNN

    init, apply = AutoregressiveNN(
        options.dim, list(options.hidden), param_dims=[1, 1], nonlinearity=stax_relu()
    )
    reverse = PermuteTransform(jnp.arange(options.dim)[::-1])

    def init_all(key):
        keys = jax.random.split(key, options.depth)
        return [init(key, (options.dim,))[1] for key in keys]

    def build(params):
        layers = []
        for layer in params:
            layers += [InverseAutoregressiveTransform(partial(apply, layer)).inv, reverse]
        base = dist.Normal(jnp.zeros(options.dim), 1.0).to_event(1)
        return dist.TransformedDistribution(base, layers)

    return numpyro_programs(build, init_all, options)


def stax_relu():
    from jax.example_libraries import stax

    return stax.Relu


def numpyro_bnaf(options) -> Programs:
    """One block: NumPyro's transform has no inverse, so its density is that of its own output.

    ``log_prob`` is therefore the transform and its log-determinant at given points, which is the
    same work as a density with the network read from data to base.
    """
    from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform
    from numpyro.nn import BlockNeuralAutoregressiveNN

    init, apply = BlockNeuralAutoregressiveNN(
        options.dim, hidden_factors=list(options.hidden_factors)
    )

    class Backward:
        def __init__(self, params):
            self.transform = BlockNeuralAutoregressiveTransform(partial(apply, params))

        def log_prob(self, x):
            z, log_det = self.transform.call_with_intermediates(x)
            return -0.5 * (z**2).sum(-1) + log_det.sum(-1)

        def sample(self, key, shape):
            raise NotImplementedError

    def init_one(key):
        return init(key, (options.dim,))[1]

    return numpyro_programs(Backward, init_one, options)


class TorchProgram:
    """A function that runs eagerly; there is nothing to compile."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def compile(self) -> float:
        return math.nan

    def run(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            output = self.function()
        seconds = (time.perf_counter() - start) / calls
        if not bool(output.isfinite().all()):
            raise FloatingPointError("A program returned values that are not finite.")
        return seconds


def torch_programs(
    module, log_prob: Callable, sample: Callable, options, noise: float = 0.05
) -> Programs:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += noise * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    programs = {
        "train step": step,
        "log_prob": torch.no_grad()(lambda: log_prob(x)),
        "sample": torch.no_grad()(lambda: sample(options.batch)),
    }
    return {name: {"": TorchProgram(function)} for name, function in programs.items()}


def zuko_programs(name: str, options, **config) -> Programs:
    import zuko

    flow = getattr(zuko.flows, name)(
        features=options.dim, transforms=options.depth, hidden_features=options.hidden, **config
    )
    return torch_programs(
        flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), options
    )


def zuko_nsf(options) -> Programs:
    return zuko_programs("NSF", options, bins=options.num_bins, passes=2)  # 2 passes: coupling


def zuko_maf(options) -> Programs:
    return zuko_programs("MAF", options)


def normflows_programs(layer: Callable[[int], Any], options) -> Programs:
    import normflows

    base = normflows.distributions.base.DiagGaussian(options.dim, trainable=False)
    flow = normflows.NormalizingFlow(base, [layer(i) for i in range(options.depth)])
    return torch_programs(flow, flow.log_prob, lambda n: flow.sample(n)[0], options)


def normflows_nsf(options) -> Programs:
    import normflows

    def layer(i):  # its network has one residual block of two layers: as many matrices as ours
        return normflows.flows.CoupledRationalQuadraticSpline(
            options.dim, 1, options.hidden[0], num_bins=options.num_bins, reverse_mask=bool(i % 2)
        )

    return normflows_programs(layer, options)


TOLERANCE = 1e-5


class TfpContinuous(eqx.Module):
    """TFP's FFJORD bijector with our field, an exact trace and the same tolerance.

    Its own exact trace cannot be differentiated in reverse mode under current JAX, so it gets one
    of two lines.
    """

    field: Any
    dim: int = eqx.field(static=True)

    def bijector(self):
        """The bijector, and the field's numbers: it takes gradients to named tensors alone."""
        from tensorflow_probability.substrates import jax as tfp
        from tensorflow_probability.substrates.jax.math.ode import base

        # TFP takes a size for a number that is known, and JAX now traces it: no gradient else.
        base.tf.size = lambda x: np.int32(math.prod(np.shape(x)))
        leaves, structure = jax.tree.flatten(self.field)
        names = [f"leaf{i}" for i in range(len(leaves))]

        def derivative(time, state, **numbers):
            field = jax.tree.unflatten(structure, [numbers[name] for name in names])
            return jax.vmap(field, in_axes=(None, 0))(time, state)

        def exact(ode_fn, shape, dtype):
            def diagonal(time, state, **numbers):
                def along(i):
                    basis = jnp.broadcast_to(jnp.eye(self.dim)[i], state[0].shape)
                    velocity = partial(ode_fn, time, **numbers)
                    value, product = jax.jvp(velocity, (state[0],), (basis,))
                    return value, product[..., i]

                value, products = jax.vmap(along, out_axes=(None, -1))(jnp.arange(self.dim))
                return value, products

            return diagonal

        solver = tfp.math.ode.DormandPrince(rtol=TOLERANCE, atol=TOLERANCE)
        bijector = tfp.bijectors.FFJORD(derivative, solver.solve, exact)
        return bijector, dict(zip(names, leaves, strict=True))

    def log_prob(self, x):
        bijector, numbers = self.bijector()
        # TFP remembers the pair of an inverse and its log-determinant: one solve.
        z = bijector.inverse(x, **numbers)
        log_det = bijector.inverse_log_det_jacobian(x, event_ndims=1, **numbers)
        return jax.scipy.stats.norm.logpdf(z).sum(-1) + log_det

    def sample(self, key, shape):
        bijector, numbers = self.bijector()
        return bijector.forward(jax.random.normal(key, (*shape, self.dim)), **numbers)


def our_cnf(options) -> nf.FlowDistribution:
    return nf.cnf(
        jax.random.key(0), options.dim, hidden=options.hidden, rtol=TOLERANCE, atol=TOLERANCE
    )


def tfp_cnf(options) -> Programs:
    flow = TfpContinuous(our_cnf(options).transform.field, options.dim)
    programs = flow_programs(*eqx.partition(flow, eqx.is_inexact_array), options)
    return {name: {"": program} for name, program in programs.items()}


def zuko_cnf(options) -> Programs:
    """zuko's transform with our field, written in torch, and the weights ours has."""
    import torch
    import zuko

    params, rest = nf.partition(our_cnf(options))
    field = eqx.combine(shake(params), rest).transform.field

    def tensors(arrays):
        return torch.nn.ParameterList(torch.tensor(np.asarray(array)) for array in arrays)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.biases = tensors(field.net.weights), tensors(field.net.biases)
            self.gates, self.shifts = tensors(field.gates), tensors(field.shifts)
            self.gate_biases = tensors(field.gate_biases)

        def forward(self, t, z):
            for i, weight in enumerate(self.weights):
                gate = torch.sigmoid(self.gates[i][:, 0] * t + self.gate_biases[i])
                z = torch.tanh(z) if i else z
                z = (z @ weight.T + self.biases[i]) * gate + self.shifts[i][:, 0] * t
            return z

    module = Field()
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(options.dim), torch.ones(options.dim)), 1
    )

    def flow():
        transform = zuko.transforms.FreeFormJacobianTransform(
            module, 1.0, 0.0, phi=module.parameters(), atol=TOLERANCE, rtol=TOLERANCE
        )
        return zuko.distributions.NormalizingFlow(transform, base)

    return torch_programs(
        module, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), options, noise=0.0
    )
