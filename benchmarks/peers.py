"""Speed of numpyro_flows beside other libraries: the same flow, the same programs, one run.

    pip install -e ".[peers]"
    python benchmarks/peers.py                       # all rows, on JAX's default device
    python benchmarks/peers.py --filter sample --rounds 100 --json peers.json

``CASES`` lists flows that several libraries offer, at the same sizes and otherwise at each
library's defaults; options on the command line replace the sizes of a case. Each library builds
three programs, in float32 and (in JAX) jitted, with the flow's parameters as arguments:

- ``train step``: value and gradient of the mean negative log-likelihood of a batch and an update
  by ``optax.adam(1e-3)``; parameters and optimiser state go in and come out;
- ``log_prob``: log density of a batch; ``sample``: as many draws.

A peer may offer variants of a program: flowjax flows built with ``invert=True`` or ``False``, and
its own training step beside a plain jitted one. All are timed, and the row takes the one of the
lowest median, marked ``*``. Weights are shaken, so no layer is trivial; results must be finite.
PyTorch's flows (zuko, normflows) run eagerly, as their users run them, with as many threads as
cores; a peer that is not installed is left out with a line that says so.

Compile time: trace, lower and compile with JAX's caches cleared, median of 3. Run time: in each
round every competitor makes the same number of calls, waiting for each result, in an order that
rotates, so that a disturbance of the machine hits all of them. The table gives medians over
rounds; ``ratio`` is ours / peer of these (below 1: ours is faster), and ``q25`` and ``q75`` are
quartiles of the ratios of single rounds: how far to trust it.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import numpyro_flows as nf

PACKAGES = ("numpyro_flows", "jax", "jaxlib", "numpyro", "equinox", "optax")
PEERS = ("flowjax", "zuko", "normflows", "tfp-nightly", "torch")
BLOCK_S = 0.02  # shortest time that one competitor's calls in a round should take
COLUMNS = ("ours ms", "peer ms", "ratio", "q25", "q75", "ours compile s", "peer compile s")
COLUMNS += ("peer variants, ms",)
OPTIMIZER = optax.adam(1e-3)
PROGRAMS = ("train step", "log_prob", "sample")
SIZES = {"dim": 16, "depth": 8, "batch": 512, "num_bins": 8, "hidden": (64, 64)}
SIZES |= {"hidden_factors": (8, 8)}
IMPOSSIBLE = {("bnaf", "sample", "numpyro")}  # NumPyro's transform has no inverse


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


class Case(NamedTuple):
    """One flow: its sizes, and builders from these for ours and for each peer."""

    name: str
    sizes: dict[str, Any]
    ours: Callable[[argparse.Namespace], Programs]
    peers: dict[str, Callable[[argparse.Namespace], Programs]]
    only: str = ""  # the programs whose name contains this


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


MAF = {"dim": 64, "depth": 5, "hidden": (256, 256)}
MAF_PEERS = {
    "flowjax": flowjax_maf,
    "numpyro": numpyro_maf,
    "zuko": zuko_maf,  # normflows' layer is the other direction: it samples in parallel
}
CASES = (
    Case(
        "realnvp",
        {},
        ours(nf.realnvp, "depth", "hidden"),
        {"flowjax": flowjax_coupling},
    ),
    Case(
        "nsf",
        {},
        ours(nf.nsf, "depth", "hidden", "num_bins"),
        {
            "flowjax": partial(flowjax_coupling, spline=True),
            "zuko": zuko_nsf,
            "normflows": normflows_nsf,
        },
    ),
    Case("maf", MAF, ours(nf.maf, "depth", "hidden"), MAF_PEERS),
    Case(
        "maf D=256",
        {**MAF, "dim": 256},
        ours(nf.maf, "depth", "hidden"),
        {"flowjax": flowjax_maf, "numpyro": numpyro_maf},
        only="sample",
    ),
    Case(
        "bnaf",
        {"depth": 1},
        ours(nf.bnaf, "depth", "hidden_factors"),
        {"flowjax": flowjax_bnaf, "numpyro": numpyro_bnaf},
    ),
    Case(
        "cnf",
        {"dim": 2, "batch": 256},
        lambda options: our_programs(our_cnf(options), options),
        {"tfp": tfp_cnf, "zuko": zuko_cnf},
    ),
)


def compare(ours: dict[str, Program], theirs: dict[str, Program], rounds: int) -> dict[str, Any]:
    """One row of the table."""
    programs = [*ours.values(), *theirs.values()]
    compiles = [np.median([program.compile() for _ in range(3)]) for program in programs]
    warm = [program.run(3) for _ in range(2) for program in programs]
    calls = max(3, math.ceil(BLOCK_S / min(warm)))
    times = np.zeros((rounds, len(programs)))
    for i in range(rounds):
        for j in np.roll(np.arange(len(programs)), i):
            times[i, j] = programs[j].run(calls)
    our_ms, *peer_ms = 1e3 * np.median(times, axis=0)
    best = int(np.argmin(peer_ms))
    variants = [f"{name} {ms:.3f}" for name, ms in zip(theirs, peer_ms, strict=True)]
    variants[best] = "*" + variants[best]
    ratios = [our_ms / peer_ms[best], *np.quantile(times[:, 0] / times[:, 1 + best], (0.25, 0.75))]
    values = our_ms, peer_ms[best], *ratios, compiles[0], compiles[1 + best], ", ".join(variants)
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SIZES:
        many = isinstance(SIZES[name], tuple)
        parser.add_argument(f"--{name}", type=int, nargs="+" if many else None)
    parser.add_argument("--rounds", type=int, default=40, help="default 40")
    parser.add_argument("--filter", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the same results")
    options = parser.parse_args()
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    for name in ("hidden", "hidden_factors"):
        if len(set(given.get(name, (1,)))) != 1:
            parser.error(f"--{name}: expected equal widths; flowjax has one for all layers.")

    jax.config.update("jax_enable_compilation_cache", False)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    try:
        versions = {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        sys.exit(f'{error.name} is missing; install the extra: pip install -e ".[peers]"')
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    print(f"{device}, load {os.getloadavg()[0]:.1f};", *map(" ".join, versions.items()))
    rows = []
    for case in CASES:
        sizes = argparse.Namespace(**{**SIZES, **case.sizes, **given})
        built: dict[str, Programs] = {}
        for peer, build in case.peers.items():
            labels = {name: f"{case.name} {name} / {peer}" for name in PROGRAMS}
            wanted = [n for n in PROGRAMS if options.filter in labels[n] and case.only in n]
            if not wanted:
                continue
            try:
                theirs = build(sizes)
            except ImportError as error:
                print(f"{case.name} / {peer}: left out, {error}")
                continue
            built = built or case.ours(sizes)
            for name in wanted:
                if (case.name, name, peer) in IMPOSSIBLE:
                    continue
                try:
                    compared = compare(built[name], theirs[name], options.rounds)
                except FloatingPointError as error:  # an eager program checks each result
                    print(f"{labels[name]}: left out, {error}")
                    continue
                rows.append({"row": labels[name], **compared})
                print(
                    " ".join(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values())
                )
    cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    cells.insert(0, ["row", *COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    if options.json:
        record = {"device": device, "versions": versions, "options": vars(options), "rows": rows}
        options.json.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main()
