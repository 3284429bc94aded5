"""FlowNUTS: draws of the posterior whatever the map, as a NumPyro kernel, and what it learns."""

import pickle
import subprocess
import sys
import textwrap

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import KEY, SMALL, Y, hierarchical, run, shaken
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, init_to_value
from numpyro.infer.util import potential_energy

import numpyro_flows as nf
from numpyro_flows.infer import fisher, learning
from numpyro_flows.infer.kernels import nuts as kernel
from numpyro_flows.infer.train import NeverFinite

MEANS = {
    "theta": (Y * 4 + 1) / 5,
    "total": ((Y * 4 + 1) / 5).sum(),
    "pair": np.zeros((2, 2)),
    "narrow": -1.0,
    "flat": np.array([0.0, 2.0]),
}
SDS = {
    "theta": np.full(4, 0.8**0.5),
    "total": (4 * 0.8) ** 0.5,
    "pair": np.full((2, 2), 3.0),
    "narrow": 1.0,
    "flat": np.ones(2),
}


@pytest.fixture(scope="module")
def learned():
    k = nf.FlowNUTS(hierarchical, SMALL, num_steps=200, progress_bar=False)
    return k, run(k, Y, extra_fields=("accept_prob", "adapt_state.step_size", "z.narrow"))


def assert_right(draws):
    for name, mean in MEANS.items():
        flat = np.asarray(draws[name]).reshape(2, len(draws[name]) // 2, -1)
        # Draws of NUTS are antithetic: those of a mean tell more than those of a variance.
        of_mean, of_sd = (
            np.array([float(arviz.ess(c, method=method)) for c in np.moveaxis(flat, -1, 0)])
            for method in ("mean", "sd")
        )
        error = (flat.mean((0, 1)) - np.ravel(mean)) / np.ravel(SDS[name]) * of_mean**0.5
        assert np.abs(error).max() < 4.5, name
        ratio = np.log(flat.std((0, 1)) / np.ravel(SDS[name])) * (2 * of_sd) ** 0.5
        assert np.abs(ratio).max() < 4.5, name


@pytest.mark.slow
def test_a_wrong_map_gives_the_right_posterior():
    k = shaken(nf.FlowNUTS(hierarchical, SMALL), Y)
    learned = k._learned.chosen.at(k._learned.model.log_density((Y,), {}))
    u = learned.base.sample(KEY, (2000,))
    log_density = jax.vmap(learned.log_density)(u)
    assert nf.diagnostics.importance_ess(log_density - learned.base.log_prob(u)) < 0.1  # wrong
    mcmc = run(k, Y, num_samples=2000)
    assert_right(mcmc.get_samples())


def test_a_learned_map_gives_the_right_posterior(learned):
    k, mcmc = learned
    assert_right(mcmc.get_samples())
    assert k.report(mcmc).run.divergences == 0


def test_potential_is_numpyros_less_the_log_determinant():
    k = shaken(nf.FlowNUTS(hierarchical, SMALL), Y)
    learned = k._learned.chosen.at(k._learned.model.log_density((Y,), {}))
    u = jax.random.normal(KEY, (3, learned.space.dim))
    x, log_det = learned.transform.forward_and_log_det(u)
    for i in range(3):
        plain = potential_energy(
            handlers.seed(hierarchical, 0), (Y,), {}, learned.space.unpack(x[i])
        )
        np.testing.assert_allclose(-learned.log_density(u[i]), plain - log_det[i], rtol=1e-5)


def test_extra_fields_deterministic_sites_and_arviz(learned):
    _, mcmc = learned
    fields = mcmc.get_extra_fields(group_by_chain=True)
    for name in ("accept_prob", "adapt_state.step_size", "diverging", "num_steps", "energy"):
        assert fields[name].shape == (2, 1000)
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_allclose(fields["z.narrow"], samples["narrow"])
    np.testing.assert_allclose(samples["total"], samples["theta"].sum(-1), rtol=1e-5)
    data = arviz.from_numpyro(mcmc)
    assert data.posterior["theta"].shape == (2, 1000, 4)
    assert "diverging" in data.sample_stats


@pytest.mark.slow
def test_chains_share_one_map_however_they_run(learned):
    k, _ = learned
    calls = []
    for method in ("sequential", "vectorized", jax.vmap):
        other = run(k, Y, num_samples=10, method=method)
        for one, two in zip(
            jax.tree.leaves(k._learned.chosen),
            jax.tree.leaves(other.last_state.flow.flow),
            strict=True,
        ):
            np.testing.assert_array_equal(one, two if method == "vectorized" else two[-1])
        calls.append(k._learned)
    assert all(one is calls[0] for one in calls)


@pytest.mark.slow
def test_the_seed_decides_the_map():
    def values(seed):
        k = nf.FlowNUTS(hierarchical, SMALL, seed=seed, num_steps=20, progress_bar=False)
        run(k, Y, num_chains=1, num_samples=2)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(k._learned.chosen)])

    np.testing.assert_array_equal(values(3), values(3))


@pytest.mark.slow
@pytest.mark.smoke
def test_other_arguments_are_learned_anew(monkeypatch):
    seen = []

    def learn(key, model, flow, init_strategy, args, kwargs, **settings):
        seen.append(args)
        return learning.learn(key, model, flow, init_strategy, args, kwargs, **settings)

    monkeypatch.setattr(kernel, "learn", learn)
    k = nf.FlowNUTS(lambda y: numpyro.sample("x", dist.Normal(y, 1.0)), progress_bar=False)
    one, two = jnp.ones(()), jnp.zeros(())
    mcmc = MCMC(k, num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(KEY, one)
    mcmc.run(KEY, one)
    mcmc.run(KEY, two)
    assert len(seen) == 2
    assert abs(float(mcmc.get_samples()["x"].mean())) < 3


def test_starts_are_honoured(learned):
    k, _ = learned
    at = {
        "theta": jnp.arange(4.0),
        "pair": jnp.ones((2, 2)),
        "narrow": jnp.array(-0.5),
        "flat": jnp.array([0.5, 1.5]),
    }
    state = k.init(KEY, 100, at, (Y,), {})
    for name, value in at.items():
        np.testing.assert_allclose(state.z[name], value, atol=1e-4)
    strategy = init_to_value(values={"narrow": jnp.array(-0.5)})
    other = nf.FlowNUTS(hierarchical, SMALL, init_strategy=strategy)
    model = k._learned.model._replace(init_strategy=strategy)
    other._learned, other._arguments = k._learned._replace(model=model), k._arguments
    state = other.init(KEY, 100, None, (Y,), {})
    np.testing.assert_allclose(state.z["narrow"], -0.5, atol=1e-4)


@pytest.mark.slow
def test_params_of_the_model_keep_their_values_and_priors_need_no_draws():
    def model(y):
        scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.factor("prior", -0.5 * x**2)
        numpyro.sample("y", dist.Normal(x, scale), obs=y)

    k = nf.FlowNUTS(model, SMALL, train="vi", num_steps=100, progress_bar=False)
    x = run(k, jnp.array(1.0), num_samples=2000).get_samples()["x"]
    np.testing.assert_allclose(x.mean(), 0.8, atol=0.06)
    np.testing.assert_allclose(x.std(), 0.2**0.5, rtol=0.1)


@pytest.mark.slow
def test_angles_are_not_cut():
    def model():
        numpyro.sample("angle", dist.VonMises(jnp.pi, 4.0))

    k = nf.FlowNUTS(model, SMALL, num_steps=200, progress_bar=False)
    angle = run(k, num_samples=2000).get_samples()["angle"]
    assert float(jnp.abs(angle).max()) <= jnp.pi
    expected = dist.VonMises(0.0, 4.0).variance
    turned = jnp.mod(angle, 2 * jnp.pi) - jnp.pi
    np.testing.assert_allclose(turned.mean(), 0.0, atol=0.06)
    np.testing.assert_allclose(1 - jnp.cos(turned).mean(), expected, rtol=0.15)


@pytest.mark.slow
def test_jumps_mix_between_modes():
    def model():
        parts = dist.Normal(jnp.array([-6.0, 6.0]), 1.0)
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), parts))

    def share(jump_every):
        k = nf.FlowNUTS(model, SMALL, jump_every=jump_every)
        shaken(k, scale=0.0, affine=nf.transforms.FixedAffine(jnp.zeros(1), 6.0))
        mcmc = run(k, num_chains=8, num_samples=2000)
        x = mcmc.get_samples(group_by_chain=True)["x"]
        return np.asarray((x > 0).mean(1)), k.report(mcmc).run

    with_jumps, report = share(1)
    np.testing.assert_allclose(with_jumps.mean(), 0.7, atol=0.03)
    assert 0.05 < report.jump_acceptance < 0.9
    # The documented failure: without jumps a chain stays in the mode where it began.
    alone, report = share(0)
    assert set(alone.round(1)) <= {0.0, 1.0}
    assert report.jump_acceptance is None


def test_report(learned):
    k, mcmc = learned
    report = k.report(mcmc)
    assert report.training_gradients > 0
    run = report.run
    assert run.gradients >= int(mcmc.get_extra_fields()["num_steps"].sum())
    assert run.bfmi.shape == (2,)
    assert (run.bfmi > 0.5).all()
    draws = mcmc.get_samples(group_by_chain=True)
    every = [draws["narrow"], *(np.moveaxis(np.asarray(draws["theta"]), -1, 0))]
    assert run.r_hat[1] >= max(float(arviz.rhat(np.asarray(x))) for x in every)
    assert run.ess_bulk[1] <= min(float(arviz.ess(np.asarray(x))) for x in every)
    assert run.ess_tail[0].split("[")[0] in ("theta", "pair", "narrow", "flat")
    assert run.trusted
    assert "Learned: " in str(report)
    assert "reliable: no sign of trouble" in str(report)
    assert k.report().run is None


def test_a_run_that_failed_is_not_reliable():
    def neck():
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(v / 2)).to_event(1))

    k = shaken(nf.FlowNUTS(neck, SMALL, max_tree_depth=3, step_size=1.0), scale=0.0)
    run_report = k.report(run(k, num_samples=200)).run
    assert not run_report.trusted
    assert run_report.verdict.startswith("not reliable: ")
    assert any(word in run_report.verdict for word in ("R-hat", "diverge", "ESS", "E-BFMI"))


def test_pickle(learned):
    k, _ = learned
    other = pickle.loads(pickle.dumps(k))
    assert_right(run(other, Y).get_samples())


def test_affine_map_of_scores_is_exact_for_a_normal():
    rng = np.random.default_rng(0)
    root = np.tril(rng.normal(size=(5, 5))) + 3 * np.eye(5)
    root[3] *= 1000.0
    loc = jnp.arange(5.0)
    x = jnp.asarray(loc + rng.normal(size=(40, 5)) @ root.T, jnp.float32)
    score = -jnp.linalg.solve(jnp.asarray(root @ root.T), (x - loc).T).T
    rough = nf.transforms.FixedAffine(x.mean(0), x.std(0))
    found = fisher.affine_of_scores(rough, fisher.Scored(x, score))
    flow = nf.FlowDistribution(dist.Normal(jnp.zeros(5), 1.0), found)
    held = jnp.asarray(loc + rng.normal(size=(200, 5)) @ root.T, jnp.float32)
    held_score = -jnp.linalg.solve(jnp.asarray(root @ root.T), (held - loc).T).T
    loss = fisher.fisher_divergence(flow, fisher.Scored(held, held_score))
    assert float(loss) < 1e-4
    exact = dist.MultivariateNormal(loc, scale_tril=jnp.asarray(root))
    np.testing.assert_allclose(flow.log_prob(held), exact.log_prob(held), atol=0.05)


@pytest.mark.slow
def test_scores_go_through_a_map_and_back(x64):
    flow = SMALL(KEY, 3)
    params, rest = nf.partition(flow)
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), params)
    transform = nf.combine(params, rest).transform

    def log_density(x):
        return -jnp.log(jnp.cosh(x)).sum(-1)

    u = jax.random.normal(KEY, (4, 3))

    def warped(u):
        y, log_det = transform.forward_and_log_det(u)
        return log_density(y) + log_det

    x = transform(u)
    drawn = fisher.Scored(x, jax.vmap(jax.grad(log_density))(x))
    back = fisher.through(transform, drawn)
    np.testing.assert_allclose(back.x, u, atol=1e-8)
    np.testing.assert_allclose(back.score, jax.vmap(jax.grad(warped))(u), rtol=1e-6)
    again = fisher.through(transform.inv, back)
    np.testing.assert_allclose(again.score, drawn.score, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("train", [pytest.param("vi", marks=pytest.mark.slow), "fisher"])
def test_a_curved_posterior_is_straightened(train, monkeypatch):
    monkeypatch.setattr(learning, "WINDOWS", 1)

    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("b", dist.Normal(a**2, 0.3))

    k = nf.FlowNUTS(model, SMALL, train=train, num_steps=600, progress_bar=False)
    mcmc = run(k, num_samples=1000)
    draws = mcmc.get_samples()
    report = k.report(mcmc)
    assert report.uses_flow
    assert report.trials[-1].measure == ("ELBO" if train == "vi" else "Fisher divergence")
    assert report.run.divergences < 20
    np.testing.assert_allclose(draws["a"].std(), 1.0, rtol=0.1)
    np.testing.assert_allclose(draws["b"].mean(), 1.0, atol=0.15)


@pytest.mark.slow
def test_a_funnel_is_followed_to_the_end_of_its_neck():
    """Chains that reach v = -10 must come back: the flow has to straighten the tail, too."""

    def model():
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(v / 2)).to_event(1))

    k = nf.FlowNUTS(model, progress_bar=False)
    mcmc = MCMC(k, num_warmup=500, num_samples=1000, num_chains=4, chain_method="vectorized")
    for seed in range(4):
        mcmc.run(jax.random.key(seed))
        v = np.asarray(mcmc.get_samples(group_by_chain=True)["v"])
        ess = float(arviz.ess(v))
        assert 1000 * ess / float(mcmc.get_extra_fields()["num_steps"].sum()) > 80
        assert k.report(mcmc).run.divergences < 20
        # Draws that alternate tell more of the mean than of the variance.
        spread = float(arviz.ess(v**2))
        np.testing.assert_allclose(v.std(), 3.0, rtol=4 / (2 * spread) ** 0.5)


def test_training_that_fails_falls_back_and_says_so(monkeypatch):
    def fails(trainer, *args, **kwargs):
        raise NeverFinite(trainer.params())

    monkeypatch.setattr(learning, "train_guide", fails)
    k = nf.FlowNUTS(hierarchical, SMALL, train="vi", progress_bar=False)
    with pytest.warns(UserWarning, match="no flow improved on an affine map"):
        mcmc = run(k, Y)
    assert not k.report().uses_flow
    assert "rejected" in str(k.report())
    assert_right(mcmc.get_samples())


@pytest.mark.slow
def test_parallel_chains_share_the_map():
    code = """
        import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        numpyro.set_host_device_count(2)
        from numpyro.infer import MCMC
        import numpyro_flows as nf

        def model():
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            numpyro.sample("b", dist.Normal(a**2, 0.3))

        kernel = nf.FlowNUTS(model, num_steps=200, progress_bar=False)
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, num_chains=2, progress_bar=False)
        mcmc.run(jax.random.key(0))
        flows = jax.tree.leaves(mcmc.last_state.flow)
        assert all((leaf[0] == leaf[1]).all() for leaf in flows)
        assert abs(float(mcmc.get_samples()["a"].std()) - 1) < 0.1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.slow
def test_simulation_based_calibration():
    """Ranks of the truth among draws are uniform (Talts et al., 2018, arXiv:1804.06788)."""
    num, draws = 256, 250

    def model(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("rows", 4):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def simulate(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace()
        return {name: trace[name]["value"] for name in ("mu", "tau", "theta", "y")}

    truth = jax.vmap(simulate)(jax.random.split(KEY, num))
    k = nf.FlowNUTS(model, SMALL, train="vi", num_steps=500, progress_bar=False)
    k.init(KEY, 200, None, (truth["y"][0],), {})
    first, k._learn = k._learned, lambda *_: k._learned
    assert first.uses_flow

    # One map for all data sets: it fits only the first, and all ranks must be uniform.
    @jax.jit
    def ranks(key, truth):
        y = truth["y"]
        state = k.init(key, 200, None, (y,), {})

        def step(state, _):
            state = jax.lax.fori_loop(0, 4, lambda _, s: k.sample(s, (y,), {}), state)
            return state, state.z

        state = jax.lax.fori_loop(0, 200, lambda _, s: k.sample(s, (y,), {}), state)
        _, z = jax.lax.scan(step, state, length=draws)
        sites = jax.vmap(k.postprocess_fn((y,), {}))(z)
        return {n: (sites[n] < truth[n]).sum(0) for n in ("mu", "tau", "theta")}

    found = jax.lax.map(
        lambda pair: ranks(*pair), (jax.random.split(jax.random.key(5), num), truth), batch_size=64
    )
    for name, rank in found.items():
        columns = np.asarray(rank).reshape(num, -1)
        for column in columns.T:
            counts, _ = np.histogram(column, bins=8, range=(0, draws + 1))
            chi2 = ((counts - num / 8) ** 2 / (num / 8)).sum()
            assert chi2 < 24.3, name  # 99.9 % of chi^2 with 7 degrees of freedom
