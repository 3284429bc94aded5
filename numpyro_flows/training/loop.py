r"""The optimisation loop, which every training of the library runs.

Three parts are kept apart. A **loss** says what is minimised, a **plan** says which steps to make
and when to stop, and :func:`optimize` makes the steps, in chunks of one compiled program each.

A loss is a hashable callable ``loss(params, fixed, batch, key) -> scalar``:

- ``params``: the pytree that trains;
- ``fixed``: any other pytree of arrays, the same in all steps: the rest of a flow, data, the
  arguments of a model;
- ``batch``: what is this step's own: row indices, a temperature, or None;
- ``key``: this step's own random key.

Losses that compare equal share their programs, so a loss with settings is a frozen dataclass, and
whatever is an array belongs into ``fixed``. The same holds for the optimiser, which is told apart
by identity: keep it. Then a second run with other numbers of the same shapes compiles nothing.

A plan (:class:`Plan`) hands out :class:`Chunk` after :class:`Chunk` and is told the losses of each,
so that it can stop early, remember the best parameters (:class:`Best`) or change the learning rate.

There is one policy for steps that are not finite. A step whose loss, gradient or update holds NaN
or an infinity changes nothing, the optimiser's state included, and its loss is reported as NaN.

>>> import jax, jax.numpy as jnp, numpy as np
>>> def loss(params, fixed, batch, key):
...     return ((params - fixed) ** 2).sum()
>>> class Hundred:
...     total, done = 100, 0
...     def next(self):
...         return None if self.done else Chunk(rates=np.full(100, 0.1))
...     def record(self, state, losses):
...         self.done += len(losses)
...         return f"loss {losses[-1]:.1e}"
>>> optimizer = adam()
>>> state = start(jnp.zeros(2), optimizer=optimizer)
>>> state = optimize(jax.random.key(0), loss, optimizer, state, jnp.array([1.0, -2.0]), Hundred(),
...                  name="doctest", progress_bar=False)
>>> state.params.round(1)
Array([ 1., -2.], dtype=float32)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from ..compilation import jit

#: ``(params, fixed, batch, key) -> scalar``.
Loss = Callable[[Any, Any, Any, Array], Array]


class State(NamedTuple):
    """What a step changes."""

    params: Any
    opt_state: Any


class Chunk(NamedTuple):
    """Some steps of one program.

    Chunks of one number of steps share a program; a last one of another length is another.

    :param rates: factors on the optimiser's updates, shape ``(steps,)``.
    :param batches: pytree of what each step gets of its own, with a first axis of ``steps``.
    :param number: index of the chunk; the keys of its steps depend on it.
    """

    rates: np.ndarray
    batches: Any = None
    number: int = 0


class Plan(Protocol):
    """Which steps to make, and when to stop.

    ``total`` and ``done`` are the length and the position of the progress bar, in units of the
    plan's own; both may change.
    """

    @property
    def total(self) -> int: ...

    @property
    def done(self) -> int: ...

    def next(self) -> Chunk | None:
        """The next steps; None ends the training."""

    def record(self, state: State, losses: np.ndarray) -> str:
        """Note the state after a chunk and the losses of its steps, NaN where one was skipped.

        :return: a text for the progress bar.
        """


@functools.lru_cache
def adam(
    clip_norm: float = 10.0, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Adam behind clipping to a global norm, with the rates of the chunks or those of a schedule.

    Equal arguments give one and the same object.
    """
    rate = optax.scale(-1.0) if schedule is None else optax.scale_by_learning_rate(schedule)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.scale_by_adam(), rate)


@jit(static_argnames="optimizer")
def start(params: Any, *, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(params, optimizer.init(params))


@jit(static_argnames=("loss", "optimizer"))
def run_steps(
    key: Array,
    state: State,
    fixed: Any,
    rates: ArrayLike,
    batches: Any,
    number: ArrayLike,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Array]:
    """The steps of one :class:`Chunk`: the state after them, and their losses, ``(steps,)``.

    It may be called inside another program.
    """

    def step(state: State, now: tuple[Any, Array, Array]) -> tuple[State, Array]:
        batch, rate, key = now
        value, grads = jax.value_and_grad(loss)(state.params, fixed, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: update * rate.astype(update.dtype), updates)
        after = State(optax.apply_updates(state.params, updates), opt_state)
        norms = optax.tree.norm(grads), optax.tree.norm(updates)
        ok = jnp.isfinite(jnp.stack([value, *norms])).all()
        state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), after, state)
        return state, jnp.where(ok, value, jnp.nan)

    rates = jnp.asarray(rates, jnp.result_type(float))
    keys = jax.random.split(jax.random.fold_in(key, number), len(rates))
    return jax.lax.scan(step, state, (batches, rates, keys))


#: The same as a program that compiles in two thirds of the time, with steps a fifth slower.
run_few_steps = jit(run_steps.__wrapped__, static_argnames=("loss", "optimizer"), once=True)


@jit(static_argnames=("loss", "optimizer"))
def run_many_steps(
    keys: Array,
    states: State,
    fixed: tuple[Any, Any],
    rates: ArrayLike,
    batches: Any,
    number: ArrayLike,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Array]:
    """The same for several members at once: all have a first axis over them, but for the rates and
    the second part of ``fixed``, which they share. The losses are ``(members, steps)``.
    """

    def run(key: Array, state: State, own: Any, batches: Any) -> tuple[State, Array]:
        return run_steps.__wrapped__(
            key, state, (own, fixed[1]), rates, batches, number, loss=loss, optimizer=optimizer
        )

    return jax.vmap(run)(keys, states, fixed[0], batches)


def optimize(
    key: Array,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: State,
    fixed: Any,
    plan: Plan,
    *,
    name: str,
    progress_bar: bool,
    save: Callable[[State], None] | None = None,
    run: Callable[..., tuple[State, Array]] | None = None,
) -> State:
    """Make the steps of a plan.

    :param key: random key, from which each step derives its own.
    :param loss: what to minimise; see the module's text.
    :param optimizer: an optax optimiser; :func:`adam` for the usual one.
    :param state: where to begin, as :func:`start` makes it.
    :param fixed: the loss's second argument.
    :param plan: which steps to make.
    :param name: name on the progress bar.
    :param progress_bar: whether to show one.
    :param save: called with the state when the plan has noted progress.
    :param run: the program, :func:`run_steps` by default, or :func:`run_many_steps` where keys,
        state and chunks are of several members.
    :return: the last state.
    """
    with tqdm(total=plan.total, initial=plan.done, disable=not progress_bar, desc=name) as bar:
        while (chunk := plan.next()) is not None:
            state, losses = (run or run_steps)(
                key, state, fixed, *chunk, loss=loss, optimizer=optimizer
            )
            before = plan.done
            bar.set_postfix_str(plan.record(state, np.asarray(losses)), refresh=False)
            bar.total = plan.total
            bar.update(plan.done - before)
            if save is not None and plan.done > before:
                save(state)
    return state


class Best:
    """The parameters of the least loss so far.

    :ivar params: these parameters.
    :ivar loss: their loss.
    :ivar when: when they were offered, in units of the caller's.
    """

    def __init__(self, params: Any, loss: float, when: int = 0):
        self.params, self.loss, self.when = params, loss, when

    def offer(self, params: Any, loss: float, when: int) -> bool:
        """Take parameters if they are better, or if none had a finite loss; whether they were."""
        better = loss < self.loss or not np.isfinite(self.loss)
        if better:
            self.params, self.loss, self.when = params, loss, when
        return better
