"""Fits on one device and on many, in processes of their own: the number of devices is set at start.

:func:`run` runs a function of this file there and reads what it returns.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
STEPS = {
    "batch_size": 64,
    "max_epochs": 10,
    "patience": 10,
}  # 50 steps, of which every fifth ragged


def run(script, *args, devices=1, processes=1, fails=False):
    """A function of this file in processes of so many devices; what the first one printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    command = [sys.executable, __file__, script, json.dumps(args), str(port), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(rank)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=600) for process in started]
    if fails:
        return [error for _, error in outputs]
    for process, (_, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, error
    return json.loads(outputs[0][0].splitlines()[-1])


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(330, 4)) @ rng.normal(size=(4, 4))
    extras = {"context": rng.normal(size=(330, 2)), "weights": rng.uniform(size=330)}
    return x, extras


def build(name, context_dim):
    import jax

    import numpyro_flows as nf

    key, small = jax.random.key(0), {"depth": 2, "hidden": (8,), "context_dim": context_dim}
    flows = {
        "realnvp": lambda: nf.realnvp(key, 4, **small),
        "nsf": lambda: nf.nsf(key, 4, **small),
        "maf": lambda: nf.maf(key, 4, **small),
        "cnf": lambda: nf.cnf(key, 4, hidden=(8,), context_dim=context_dim),
        "matching": lambda: nf.cnf(key, 4, hidden=(8,), context_dim=context_dim),
        "glow": lambda: nf.glow(key, (4, 4, 1), levels=1, depth=2, hidden=(8, 8)),
    }
    return flows[name]()


def mesh_of(kind):
    import jax
    from jax.sharding import AxisType, Mesh

    devices = np.array(jax.devices())
    if kind == "none":
        return None
    if kind == "explicit":
        types = (AxisType.Explicit,)
        return jax.make_mesh((len(devices),), ("rows",), axis_types=types)
    if kind == "two axes":
        return Mesh(devices.reshape(-1, 2), ("rows", "other"))
    return Mesh(devices, ("rows",))


def numbers(tree):
    import jax

    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(tree)]


def own_rows(array):
    """The part of this process."""
    import jax

    return np.split(array, jax.process_count())[jax.process_index()]


def fit(name, kind, with_extras=False, **settings):
    import jax

    import numpyro_flows as nf

    x, extras = data()
    extras = extras if with_extras else {}
    if name == "glow":
        x = np.random.default_rng(0).integers(0, 256, size=(200, 4, 4, 1))
    x, extras = own_rows(x), {name: own_rows(value) for name, value in extras.items()}
    objective = nf.FlowMatching() if name == "matching" else None
    fitted = nf.fit(
        jax.random.key(1),
        build(name, 2 if extras else 0),
        x,
        mesh=mesh_of(kind),
        objective=objective,
        progress_bar=False,
        **STEPS | extras | settings,
    )
    # The order of a distribution's numbers differs between processes.
    return [
        numbers(getattr(fitted.flow, "flow", fitted.flow).transform),
        fitted.train_losses.tolist(),
        fitted.val_losses.tolist(),
    ]


def regression():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 3))
    y = (x @ [1, -2, 0.5] + rng.logistic(size=160) > 0).astype(float)

    def model(x, y):
        b = numpyro.sample("b", dist.Normal(0, 3).expand([3]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        numpyro.sample("y", dist.Bernoulli(logits=jnp.asarray(x) @ b * scale), obs=y)

    return model, x, y


def fit_guide(kind, rows="here", recipe="realnvp"):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import numpyro_flows as nf

    model, x, y = regression()
    mesh = mesh_of(kind)
    if rows == "split":
        x, y = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("rows")))
    recipes = {
        "realnvp": lambda key, dim: nf.realnvp(key, dim, depth=2, hidden=(8,)),
        "cnf": lambda key, dim: nf.cnf(key, dim, hidden=(8,), trace="exact"),
    }
    guide = nf.AutoFlow(model, recipes[recipe])
    settings = {"num_steps": 60, "num_particles": 32, "num_draws": 500, "progress_bar": False}
    fitted = nf.fit_guide(jax.random.key(1), guide, x, y, mesh=mesh, **settings)
    return [numbers(fitted.params), fitted.losses.tolist(), [fitted.elbo, fitted.ess]]


def difference(one, other):
    """The largest of two results."""
    if isinstance(one, list):
        return max(map(difference, one, other), default=0.0)
    return abs(one - other)


def compare_fits(name, kinds, with_extras=False):
    """Largest differences of fits on meshes from that on one device."""
    reference = fit(name, "none", with_extras)
    return [difference(reference, fit(name, kind, with_extras)) for kind in kinds]


def compare_guides(cases):
    """The same of guides: mesh, where the rows are, recipe."""
    references = {recipe: fit_guide("none", recipe=recipe) for _, _, recipe in cases}
    return [difference(references[case[2]], fit_guide(*case)) for case in cases]


def collectives(name="realnvp"):
    """Number of parameters, and collective operations in the program of the training steps."""
    import re

    import jax

    import numpyro_flows as nf
    from numpyro_flows.training import batches, loop, mesh, objectives

    split = mesh.split_over(mesh_of("auto"), "batch_size", 64)
    params, rest = nf.partition(build(name, 0))
    x, _ = data()
    rows = {"x": x, "weights": np.ones(len(x))}
    source = batches.SplitArrays(split, rows, np.zeros(len(x)), [0], 64, 33)
    optimizer = loop.adam()
    key, state, rest = split.replicated(
        (jax.random.key(0), loop.start(params, optimizer=optimizer), rest)
    )
    piece = next(source.epoch(1))
    loss = objectives.BatchLoss(objectives.MaximumLikelihood(), source.select, split)
    program = jax.jit(
        lambda *args: loop.run_steps.__wrapped__(*args, loss=loss, optimizer=optimizer)
    )
    steps = np.ones(len(piece.num_rows))
    text = program.lower(key, state, (rest, None), steps, piece.batches, 0).compile().as_text()
    pattern = r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [sizes, [found[::-1] for found in re.findall(pattern, text)]]


def fit_unevenly():
    """Processes with different numbers of rows."""
    import jax

    import numpyro_flows as nf

    rows = data()[0][: 100 - 10 * jax.process_index()]
    nf.fit(jax.random.key(1), build("realnvp", 0), rows, mesh=mesh_of("auto"), progress_bar=False)


def refusals():
    """Texts of errors for numbers that eight devices do not divide."""
    import jax

    import numpyro_flows as nf

    key, mesh, (model, x, y) = jax.random.key(0), mesh_of("auto"), regression()
    calls = (
        lambda: nf.fit(key, build("realnvp", 0), data()[0], mesh=mesh, batch_size=100),
        lambda: nf.fit_guide(key, nf.AutoFlow(model), x, y, mesh=mesh, num_particles=12),
    )
    texts = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    return texts


def main():
    script, args, port, processes, rank = sys.argv[1:]
    import jax

    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank))
    print(json.dumps(globals()[script](*json.loads(args))))


if __name__ == "__main__":
    main()
