"""What ``fit_guide`` trains: a flow over a latent space, or anything that NumPyro's ``SVI`` can."""

import copy
import dataclasses
import functools
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState

from ..compilation import jit, split
from ..training.loop import State, adam, run_few_steps, run_steps, start
from ..training.mesh import Split
from .arguments import Static, join_arguments, split_arguments
from .centring import degrees_of
from .density import hidden_discrete, is_subsampled, latent_of, unblocked
from .elbo import STL_ELBO, LatentELBO, with_penalties
from .guides.auto import AutoFlow, Begun
from .importance import weighted_draws
from .latent_space import LogDensity
from .maps import Weighted, draw
from .propriety import improper_sites

#: Largest global norm of a gradient.
CLIP: Final = 10.0
#: Chunks of steps before which an ending is likely; only then faster steps are worth compiling.
FEW: Final = 10


def default_num_particles(dim: int) -> int:
    """Draws per step: 128 up to 200 dimensions, then fewer, at least 16."""
    return int(np.clip(25_600 // dim, 16, 128))


#: Draws of the latent sites, ``(n, *shape)``, and their log importance weights, ``(n,)``.
Weighed = tuple[dict[str, np.ndarray], np.ndarray]


def _weighed(guide: AutoGuide, drawn: Weighted) -> Weighed:
    latent = latent_of(guide.prototype_trace)
    draws = {name: np.asarray(x) for name, x in drawn.sites.items() if name in latent}
    return draws, np.asarray(drawn.log_p, float) - np.asarray(drawn.log_q, float)


class Trainer(Protocol):
    """A guide in training."""

    num_particles: int
    #: Whether the start was searched for, and may leave nothing to gain.
    has_located: bool
    #: Sites along which the density does not fall.
    improper: tuple[str, ...]

    @property
    def is_noisy(self) -> bool:
        """Whether importance weights have the noise of rows that were drawn at random."""

    def params(self) -> dict[str, Any]:
        """The parameters now."""

    def run(self, rates: np.ndarray, tempers: np.ndarray | None) -> np.ndarray:
        """A step for each learning rate; the losses, NaN where a step was left out."""

    def weigh(self, key: Array, params: dict[str, Any], num_draws: int) -> Weighed:
        """Draws of the latent sites, and their log importance weights."""

    def state(self) -> Any:
        """All that a chunk of steps changes, as a pytree."""

    def restore(self, state: Any, num_chunks: int) -> None:
        """Go on from such a state, after so many chunks."""


def _negative_elbo(params: Any, objective: LatentELBO, temper: Array, key: Array) -> Array:
    return objective(params, temper, key)


class LatentTrainer:
    """An ``AutoFlow`` without another objective: the model is traced once, and few programs serve.

    :ivar num_gradients: gradients of the model that the search for the preconditioner took.
    """

    has_located = True

    def __init__(
        self,
        key: Array,
        guide: AutoFlow,
        begun: Begun,
        num_particles: int | None,
        init_params: dict[str, Any],
        over: Split | None = None,
    ):
        locate_key, flow_key, step_key, _ = split(key, 4)
        flow_name, affine_name = guide.names
        self.num_gradients = 0
        self.improper: tuple[str, ...] = ()
        affine = init_params.get(affine_name)
        if affine is None:
            affine, self.num_gradients, is_searched = guide.locate(locate_key, begun)
            if is_searched:
                density = begun.density.centred(degrees_of(affine))
                self.improper = improper_sites(density, affine)
        flow = init_params.get(flow_name)
        if flow is None:
            flow = guide.initial_flow(flow_key)
        default = default_num_particles(guide.latent_dim)
        self._guide, self._affine, self._begun = guide, affine, begun
        self._state, self._key, self._num_chunks = State(flow, None), step_key, 0
        self._over = over
        if over is not None:
            default = over.multiple(default)
        self.num_particles = num_particles or default
        self.objective = guide.elbo(begun.density, affine, self.num_particles)
        self._trained = self.objective
        if over is not None:
            # Where the model's rows are split, the particles are not.
            by = None if over.holds(begun.density) else over
            self._trained = over.replicated(dataclasses.replace(self.objective, split=by))

    def params(self) -> dict[str, Any]:
        flow = self._state.params if self._over is None else self._over.local(self._state.params)
        return dict(zip(self._guide.names, (flow, self._affine), strict=True))

    def run(self, rates: np.ndarray, tempers: np.ndarray | None) -> np.ndarray:
        optimizer = adam(CLIP)
        self._begin()
        tempers = np.ones_like(rates) if tempers is None else tempers
        run = run_few_steps if self._num_chunks < FEW else run_steps
        self._state, losses = run(
            self._key,
            self._state,
            self._trained,
            rates,
            tempers,
            self._num_chunks,
            loss=_negative_elbo,
            optimizer=optimizer,
        )
        self._num_chunks += 1
        return np.asarray(losses)

    def _begin(self) -> None:
        """The optimiser's state before the first step."""
        if self._state.opt_state is not None:
            return
        self._state = start(self._state.params, optimizer=adam(CLIP))
        if self._over is not None:
            self._key, self._state = self._over.replicated((self._key, self._state))

    def state(self) -> Any:
        self._begin()
        return self._state

    def restore(self, state: Any, num_chunks: int) -> None:
        self._begin()
        self._state = state if self._over is None else self._over.replicated(state)
        self._num_chunks = num_chunks

    @functools.cached_property
    def _judge(self) -> tuple[LogDensity, bool]:
        """The density that judges, of all rows if the model can have them; whether it is noisy."""
        if not is_subsampled(self._guide.prototype_trace):
            return self.objective.density, False
        args, kwargs = self._begun.args, self._begun.kwargs
        try:
            return self._guide.log_density(self.params(), args, kwargs, whole=True), False
        except (TypeError, ValueError):  # rows of a batch do not fit a whole plate
            return self.objective.density, True

    @property
    def is_noisy(self) -> bool:
        return self._judge[1]

    def weigh(self, key: Array, params: dict[str, Any], num_draws: int) -> Weighed:
        learned = self._guide.learned(params, (), {}, self._judge[0])
        return _weighed(self._guide, draw(learned, key, num_draws))


class SVITrainer:
    """Any guide and objective, by NumPyro's ``SVI``."""

    has_located = False
    improper: tuple[str, ...] = ()

    def __init__(
        self,
        key: Array,
        guide: AutoGuide,
        args: tuple,
        kwargs: dict[str, Any],
        elbo: ELBO | None,
        num_particles: int | None,
        init_params: dict[str, Any],
    ):
        # The learning rate is a number of the optimiser's state, so that a plateau can change it.
        optimizer = optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.clip_by_global_norm(CLIP), optax.adam(learning_rate)
            )
        )(learning_rate=0.0)
        objective, model = STL_ELBO, unblocked(guide.model)
        if hidden_discrete(guide.model, args, kwargs):
            from numpyro.contrib.funsor import config_enumerate  # needs the package funsor

            objective, model = TraceEnum_ELBO, config_enumerate(model)
        self._svi = SVI(model, with_penalties(guide), optimizer, elbo or objective())
        self._state = self._svi.init(key, *args, init_params=init_params, **kwargs)
        if elbo is None:
            # Only now is the dimension known.
            dim = getattr(guide, "latent_dim", 1)
            self._svi.loss = objective(num_particles=num_particles or default_num_particles(dim))
        self.num_particles = getattr(self._svi.loss, "num_particles", 1)
        self._guide, self._args, self._kwargs = guide, args, kwargs
        self._run = self._program(self._svi)

    @staticmethod
    def _program(svi: SVI) -> Any:
        @jit(static_argnums=3)
        def run(
            state: SVIState, controls: tuple[Array, Array | None], traced: Any, static: Static
        ) -> tuple[SVIState, Array]:
            args, kwargs = join_arguments(traced, static)

            def step(state: SVIState, control: tuple[Array, Array | None]) -> Any:
                rate, factor = control
                here = svi
                if factor is not None:
                    here = copy.copy(svi)
                    here.model = handlers.scale(svi.model, scale=factor)
                count, (params, opt_state) = state.optim_state
                hyperparams = opt_state.hyperparams | {"learning_rate": rate}
                opt_state = opt_state._replace(hyperparams=hyperparams)
                state = state._replace(optim_state=(count, (params, opt_state)))
                return here.stable_update(state, *args, **kwargs)

            return jax.lax.scan(step, state, controls)

        return run

    def params(self) -> dict[str, Any]:
        return self._svi.get_params(self._state)

    def state(self) -> Any:
        return self._state

    def restore(self, state: Any, num_chunks: int) -> None:
        self._state = state

    def run(self, rates: np.ndarray, tempers: np.ndarray | None) -> np.ndarray:
        controls = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), (rates, tempers))
        arguments = split_arguments(self._args, self._kwargs)
        self._state, losses = self._run(self._state, controls, *arguments)
        return np.asarray(losses)

    @property
    def is_noisy(self) -> bool:
        return is_subsampled(self._guide.prototype_trace)

    def weigh(self, key: Array, params: dict[str, Any], num_draws: int) -> Weighed:
        drawn = weighted_draws(key, self._guide, params, self._args, self._kwargs, num_draws)
        return _weighed(self._guide, drawn)
