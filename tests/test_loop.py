"""The optimisation loop alone, by a quadratic loss whose path has a closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import compiled_programs

from numpyro_flows.training.loop import Best, Chunk, adam, optimize, run_steps, start

KEY = jax.random.key(0)
DESCENT = optax.sgd(1.0, momentum=0.5)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Half the squared distance from a centre, times this step's factor."""

    noise: float = 0.0

    def __call__(self, params, fixed, batch, key):
        factor, centre = (1.0 if batch is None else batch), fixed["centre"]
        noise = self.noise * jax.random.normal(key, centre.shape)
        return 0.5 * factor * ((params["at"] - centre - noise) ** 2).sum()


class Plan:
    """These chunks, one after the other."""

    def __init__(self, *chunks):
        self.chunks, self.total, self.done = list(chunks), len(chunks), 0
        self.losses = []

    def next(self):
        return self.chunks[self.done] if self.done < self.total else None

    def record(self, state, losses):
        self.losses.append(losses)
        self.done += 1
        return f"loss {losses[-1]}"


def run(plan, *, centre=(1.0, -2.0), loss=None, optimizer=DESCENT, key=KEY, **settings):
    state = start({"at": np.zeros(len(centre), np.float32)}, optimizer=optimizer)
    fixed = {"centre": np.asarray(centre, np.float32)}
    settings = {"name": "steps", "progress_bar": False} | settings
    return optimize(key, loss or Quadratic(), optimizer, state, fixed, plan, **settings)


def by_hand(rates, factors, centre=(1.0, -2.0)):
    """The same in NumPy: momentum, the chunk's rates, and no trace of steps that are skipped."""
    at, velocity, losses = np.zeros(2), np.zeros(2), []
    for rate, factor in zip(rates, factors, strict=True):
        if not np.isfinite(factor * rate):
            losses.append(np.nan)
            continue
        losses.append(0.5 * factor * ((at - centre) ** 2).sum())
        velocity = factor * (at - centre) + 0.5 * velocity
        at = at - rate * velocity
    return at, velocity, losses


def test_rates_and_batches_are_those_of_the_step():
    rates, factors = np.linspace(0.3, 0.05, 6), np.array([1.0, 0.5, 2.0, 1.0, 0.1, 1.0])
    plan = Plan(Chunk(rates[:3], factors[:3], 1), Chunk(rates[3:], factors[3:], 2))
    state = run(plan)
    at, _, losses = by_hand(rates, factors)
    np.testing.assert_allclose(state.params["at"], at, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(plan.losses), losses, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "update"])
def test_a_step_that_is_not_finite_changes_nothing(bad, where):
    rates, factors = np.full(5, 0.2), np.ones(5)
    (factors if where == "loss" else rates)[2] = bad
    plan = Plan(Chunk(rates, factors))
    state = run(plan)
    at, velocity, losses = by_hand(rates, factors)
    np.testing.assert_allclose(state.params["at"], at, rtol=1e-5)
    np.testing.assert_allclose(plan.losses[0], losses, rtol=1e-5)
    assert np.flatnonzero(np.isnan(plan.losses[0])).tolist() == [2]
    # The momentum is what it would be without the step.
    [trace] = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2,)]
    np.testing.assert_allclose(trace, velocity, rtol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_too():
    def loss(params, fixed, batch, key):
        # At 0 the value is 0 and the gradient infinite.
        return jnp.sqrt(jnp.abs(params["at"] * batch)).sum()

    plan = Plan(Chunk(np.ones(3), np.ones(3)))
    state = run(plan, loss=loss)
    assert np.isnan(plan.losses[0]).all()
    assert not np.any(state.params["at"])


def test_each_step_has_a_key_of_its_own():
    chunks = [Chunk(np.zeros(4), None, number) for number in (1, 2, 1)]
    plan = Plan(*chunks)
    run(plan, loss=Quadratic(noise=1.0))
    first, second, again = plan.losses
    assert len(np.unique(np.concatenate([first, second]))) == 8
    np.testing.assert_array_equal(first, again)


def test_other_numbers_of_the_same_shapes_compile_nothing():
    chunks = [Chunk(np.full(7, 0.1), np.ones(7), number) for number in (1, 2)]
    with compiled_programs() as programs:
        run(Plan(*chunks), loss=Quadratic(0.125), centre=(1.0, 2.0, 3.0))
    assert sorted(programs) == ["jit(run_steps)", "jit(start)"]
    others = [Chunk(np.full(7, 0.3), np.arange(7.0), number) for number in (5, 6, 7)]
    key = jax.random.key(1)  # may be a program of its own
    with compiled_programs() as programs:
        run(Plan(*others), loss=Quadratic(0.125), centre=(5.0, 3.0, 0.0), key=key)
    assert programs == []


def test_it_runs_inside_another_program():
    @jax.jit
    def whole(centre):
        state = start({"at": jnp.zeros(2)}, optimizer=DESCENT)
        rates = jnp.full(5, 0.2)
        fixed = {"centre": centre}
        return run_steps(KEY, state, fixed, rates, None, 0, loss=Quadratic(), optimizer=DESCENT)

    centres = jnp.array([[1.0, -2.0], [3.0, 0.0]])
    states, _ = jax.vmap(whole)(centres)
    for found, centre in zip(states.params["at"], centres, strict=True):
        at, *_ = by_hand(np.full(5, 0.2), np.ones(5), np.asarray(centre))
        np.testing.assert_allclose(found, at, rtol=1e-5, atol=1e-6)


def test_the_plan_may_change_its_mind_and_saves_follow_its_progress(capfd):
    class Impatient(Plan):
        def record(self, state, losses):
            self.total = 2
            return super().record(state, losses)

    saved = []
    plan = Impatient(*[Chunk(np.full(2, 0.1), None, i) for i in range(9)])
    state = run(plan, save=saved.append, progress_bar=True)
    assert len(saved) == len(plan.losses) == 2
    np.testing.assert_array_equal(saved[-1].params["at"], state.params["at"])
    assert "2/2" in capfd.readouterr().err


def test_adam_is_that_of_optax_and_one_object():
    assert adam(3.0) is adam(3.0)

    def schedule(step):
        return 0.1 / (1 + step)

    rates = np.asarray(schedule(np.arange(6)))
    theirs = optax.chain(optax.clip_by_global_norm(3.0), optax.adam(schedule))
    ends = [
        run(Plan(Chunk(rates)), optimizer=adam(3.0)),
        run(Plan(Chunk(np.ones(6))), optimizer=adam(3.0, schedule)),
        run(Plan(Chunk(np.ones(6))), optimizer=theirs),
    ]
    for end in ends[:2]:
        np.testing.assert_allclose(end.params["at"], ends[2].params["at"], rtol=1e-5)


def test_best():
    best = Best("start", np.nan)
    assert best.offer("a", np.inf, 1)  # nothing was finite: the last is kept
    assert best.offer("b", 2.0, 2)
    assert not best.offer("c", np.nan, 3)
    assert not best.offer("d", 2.0, 4)
    assert best.offer("e", 1.0, 5)
    assert (best.params, best.loss, best.when) == ("e", 1.0, 5)
