"""``FlowNUTS``: NUTS in the base space of a flow that it learns before it starts."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.infer import MCMC
from numpyro.infer.hmc import HMCState, hmc
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from ...checks import check_size
from ...compilation import is_outside, is_traced, jit
from ...distribution import FlowDistribution
from ..guide_flow import guide_flow
from ..guides import AutoFlow
from ..latent_space import sites_of
from ..learning import GOOD_ENOUGH, TRAIN, Chosen, Learned, learn
from ..log_density_model import LogDensityModel
from ..maps import LearnedMap
from ..traced import Traced
from .report import FlowNUTSReport, report_of, report_of_run
from .starts import checked_start, init_to_one_of, start_of
from .state import FlowNUTSState

#: Fewest iterations in which NUTS finds a step size.
LEAST_WARMUP: Final = 20


class FlowNUTS(MCMCKernel):
    r"""NUTS in the base space of a flow that it learns by itself.

    With T the learned map from base to the unconstrained latent space, NUTS samples u with
    density :math:`p(T(u)) \, |\det T'(u)|`, in one pass of the flow per gradient, and returns
    :math:`T(u)`: draws of the model's posterior whatever T is. A good T makes the density of u
    close to a standard normal, where NUTS takes long, safe steps.

    Use it as ``NUTS``: ``MCMC(nf.FlowNUTS(model), num_warmup=500, num_samples=1000)``, with any
    number of chains and any ``chain_method``, ``extra_fields``, and ``arviz.from_numpyro``.

    **Learning** happens once, when the first chain is initialised, from the kernel's own
    ``seed``: all chains share the map, and a second ``run`` on the same arguments uses it again. It
    goes from simple to rich and stops where nothing is left to gain; what is not better than what
    was there is not taken, so the worst case is NUTS behind an affine map (:meth:`report`).

    - An affine map found by optimisation (Pathfinder and short Gaussian fits), as ``AutoFlow`` has.
    - ``train="vi"``: the flow as ``nf.fit_guide`` trains it, accepted if its ELBO is higher.
    - ``train="fisher"``: three windows of pilot chains, each followed by an affine map and a flow
      trained to the smallest Fisher divergence on the chains' draws and scores, accepted if it is
      smaller on the draws of held-out chains.
    - ``train="auto"``: nothing more where NUTS moves well behind the affine map (importance ESS of
      50 %, or of 30 % with a k-hat below 0.5). Else pilot chains say how many gradients an
      effective draw takes there, and an affine map is fitted to their draws and scores. A flow is
      trained (``"vi"``, and one window of ``"fisher"`` where that leaves an ESS below 90 %) if the
      chains diverge or disagree, or if it saves more gradients than it takes, with as many draws
      wanted as ``num_warmup`` for each vectorised chain. With jumps it is trained in any case. The
      report has the decision.

    **Jumps.** NUTS does not cross from mode to mode, whatever its coordinates. With
    ``jump_every=n`` each n-th iteration also proposes a draw of the flow and accepts it by the
    ratio of importance weights, which is exact and mixes between the modes that the flow covers.
    For that, more pilot chains begin at scattered starts (``init_strategy``), and a flow is trained
    by maximum likelihood on what they find, accepted if held-out chains are likelier under it. A
    mode that no start leads to is not found. Without jumps each chain stays in its mode.

    Cost: the training (some seconds to a minute on CPU), then one gradient of the model and one
    pass of the flow per step. Vectorised chains are the fastest on one device.

    Sources: Hoffman et al. (2019), arXiv:1903.03704 (neural transport); Seyboldt, Carlson &
    Carpenter (2026), arXiv:2603.18845 (Fisher divergence); Gabrié, Rotskoff & Vanden-Eijnden
    (2022), arXiv:2105.12603 (jumps).

    :param model: a NumPyro model; its ``param`` sites keep their initial values, and discrete
        latent sites of finitely many values are summed out (package ``funsor``), as under ``NUTS``.
    :param potential_fn: in place of a model, a negative log density of any pytree of unconstrained
        values, as for ``NUTS``: the run needs ``init_params``, from which the search starts as
        well, and its draws are such pytrees. A keyword.
    :param flow: a recipe, as for ``nf.AutoFlow``; smooth couplings by default. Splines have kinks
        in their gradient, which cost NUTS steps.
    :param train: ``"auto"``, ``"vi"`` or ``"fisher"``.
    :param num_steps: largest number of training steps by ELBO.
    :param num_particles: draws per training step; as ``nf.fit_guide`` chooses by default.
    :param num_pilots: pilot chains, at least 4.
    :param num_pilot_draws: draws of each pilot chain per window, after as many of warm-up.
    :param jump_every: iterations from jump to jump, 0 for none.
    :param seed: seed of the random numbers of the learning.
    :param init_strategy: NumPyro's initialisation strategy for the search and for the chains. By
        default, the search starts as ``init_to_uniform`` and the chains at draws of the flow.
    :param progress_bar: whether training shows one.
    :param step_size: as the following, of ``numpyro.infer.NUTS``.
    :param adapt_step_size: whether warm-up adapts the step size.
    :param adapt_mass_matrix: whether warm-up adapts the metric in the base space; by default where
        the map has an importance ESS below 95 %, since elsewhere an estimate has more noise than
        there is to correct.
    :param dense_mass: whether that metric is dense.
    :param target_accept_prob: target acceptance probability; 0.8 by default, and 0.7 in 50
        dimensions or more if the map has an importance ESS of 95 %: what is best for a normal is
        about 0.65 (Beskos et al., 2013, arXiv:1001.4460), and the rest is caution.
    :param max_tree_depth: largest depth of a trajectory's tree.
    :param regularize_mass_matrix: whether the metric's estimate is shrunk.
    :param find_heuristic_step_size: whether a step size is searched for at each window.
    :param forward_mode_differentiation: whether the model's gradient is taken in forward mode, as
        models with a ``while`` loop need it, at the cost of one pass for each coordinate.
    :raises TypeError: for a model or recipe that cannot be called.
    :raises ValueError: for an unknown ``train`` or numbers out of range; while initialising, for a
        model without latent sites or with discrete ones that cannot be summed out, arguments that
        are traced, or fewer than 20 iterations of warm-up.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> from numpyro.infer import MCMC
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> mcmc = MCMC(nf.FlowNUTS(model), num_warmup=50, num_samples=100, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> mcmc.get_samples()["x"].shape
    (100,)
    """

    def __init__(
        self,
        model: Callable | None = None,
        flow: Callable[..., FlowDistribution] = guide_flow,
        *,
        potential_fn: Callable[[Any], Any] | None = None,
        train: str = "auto",
        num_steps: int = 4000,
        num_particles: int | None = None,
        num_pilots: int = 8,
        num_pilot_draws: int = 100,
        jump_every: int = 0,
        seed: int = 0,
        init_strategy: Callable | None = None,
        progress_bar: bool = True,
        step_size: float = 1.0,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool | None = None,
        dense_mass: bool = False,
        target_accept_prob: float | None = None,
        max_tree_depth: int = 10,
        regularize_mass_matrix: bool = True,
        find_heuristic_step_size: bool = False,
        forward_mode_differentiation: bool = False,
    ):
        if (model is None) == (potential_fn is None):
            raise ValueError("FlowNUTS: expected one of `model` and `potential_fn`.")
        given: Any = potential_fn or model
        if not callable(given):
            name = "model: expected a NumPyro model"
            if model is None:
                name = "potential_fn: expected a function"
            raise TypeError(f"{name}, got {type(given).__name__}.")
        if train not in TRAIN:
            raise ValueError(f"train: expected one of {sorted(TRAIN)}, got {train!r}.")
        if target_accept_prob is not None and not 0 < target_accept_prob < 1:
            raise ValueError(
                f"target_accept_prob: expected a number in (0, 1), got {target_accept_prob}."
            )
        AutoFlow(given, flow)  # raises here for a wrong recipe
        self._model: Any = model
        self._potential_fn: Any = potential_fn
        self._flow = flow
        self._learning: dict[str, Any] = {
            "train": train,
            "num_steps": check_size("num_steps", num_steps),
            "num_particles": num_particles and check_size("num_particles", num_particles),
            "num_pilots": check_size("num_pilots", num_pilots, minimum=4),
            "num_pilot_draws": check_size("num_pilot_draws", num_pilot_draws, minimum=20),
            "several_modes": jump_every > 0,
            "forward_mode": bool(forward_mode_differentiation),
            "progress_bar": progress_bar,
        }
        self._jump_every = check_size("jump_every", jump_every, minimum=0)
        self._seed = check_size("seed", seed, minimum=0)
        self._init_strategy = init_strategy
        self._nuts = {
            "step_size": step_size,
            "adapt_step_size": adapt_step_size,
            "adapt_mass_matrix": adapt_mass_matrix,
            "dense_mass": dense_mass,
            "target_accept_prob": target_accept_prob,
            "max_tree_depth": max_tree_depth,
            "regularize_mass_matrix": regularize_mass_matrix,
            "find_heuristic_step_size": find_heuristic_step_size,
        }
        self._learned: Learned | None = None
        self._arguments: Any = None
        # `MCMC` initialises a kernel whose `_sample_fn` is None.
        self._init_fn: Any = None
        self._sample_fn: Any = None
        self._built_for: Any = None
        self._num_warmup = 0

    @property
    def model(self) -> Callable | None:
        """The model; None where a potential energy was given."""
        return None if self._potential_fn else self._model

    @property
    def sites(self) -> dict[str, Array]:
        """Which base coordinates became each site: indices of the site's unconstrained shape.

        ``extra_fields=("warped.z",)`` keeps the draws in the base space, ``(dim,)`` each.

        :raises ValueError: before a map was learned.
        """
        space = self._known().model.space
        return self._as_given(space.unpack(jnp.arange(space.dim)))

    @property
    def sample_field(self) -> str:
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        # More than NUTS's, for the report.
        return ("z", "diverging", "num_steps", "energy", "jumped")

    def get_diagnostics_str(self, state: FlowNUTSState) -> str:
        return (
            f"{state.num_steps} steps of size {state.adapt_state.step_size:.2e}. "
            f"acc. prob={state.mean_accept_prob:.2f}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_init_fn": None, "_sample_fn": None}

    def _as_given(self, sites: dict[str, Array]) -> Any:
        """Unconstrained values of the sites, as the pytree that a potential energy takes."""
        return self._model.tree(sites) if self._potential_fn else sites

    def _model_of(self, init_params: Any, many: bool) -> tuple[dict[str, Array], Callable | None]:
        """Take the model that a potential energy is at these starts; these, and a strategy."""
        if init_params is None:
            raise ValueError(
                "FlowNUTS: a potential energy has no starts of its own: "
                "`mcmc.run(key, init_params=...)`, a pytree of unconstrained values, with the "
                "number of chains first if there are several."
            )
        starts = init_params if many else jax.tree.map(lambda x: jnp.asarray(x)[None], init_params)
        first = jax.tree.map(lambda x: x[0], starts)
        if self._model is None or not self._model.is_like(first):
            log_density = functools.partial(_minus, self._potential_fn)
            self._model, self._learned = LogDensityModel(log_density, first), None
        strategy = None if is_traced(starts) else init_to_one_of(self._model.sites(starts))
        return self._model.sites(init_params), strategy

    def _learn(
        self, args: tuple, kwargs: dict[str, Any], num_wanted: int, strategy: Callable | None
    ) -> Learned:
        """The map for these arguments, learned if it was not."""
        arguments = jax.tree.flatten((args, kwargs))
        if self._learned is not None and _same(arguments, self._arguments):
            return self._learned
        # Chains may be initialised under `vmap` or `pmap`; what is learned does not depend on them.
        now = contextlib.nullcontext() if is_outside() else jax.ensure_compile_time_eval()
        with now, handlers.block():
            learned = learn(
                jax.random.key(self._seed),
                self._model,
                self._flow,
                strategy,
                args,
                kwargs,
                num_wanted=num_wanted,
                **self._learning,
            )
        if learned.improper:
            warnings.warn(
                "FlowNUTS: the posterior seems to be improper: far out along "
                f"{', '.join(map(repr, learned.improper))} its density does not fall, and draws "
                "have no meaning. Give these sites proper priors.",
                stacklevel=2,
            )
        flows = [trial for trial in learned.trials if trial.is_flow]
        if flows and not learned.uses_flow:
            warnings.warn(
                "FlowNUTS: no flow improved on an affine map, and sampling goes on with that. "
                f"{'; '.join(map(str, flows))}.",
                stacklevel=2,
            )
        self._learned, self._arguments = learned, arguments
        return learned

    def _known(self) -> Learned:
        """What was learned."""
        if self._learned is None:
            raise ValueError("FlowNUTS: nothing was learned yet. Call `mcmc.run(key, ...)` first.")
        return self._learned

    def _map_at(self, chosen: Chosen, args: tuple, kwargs: dict[str, Any]) -> LearnedMap:
        """The map with the model at these arguments, whatever it was learned for."""
        return chosen.at(self._known().model.log_density(args, kwargs))

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: dict[str, Array] | None = None,
        model_args: tuple = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> FlowNUTSState:
        """Learn the map, if need be, and start a chain, or one for each key.

        :param rng_key: ``jax.random.key``, or an array of them for vectorised chains.
        :param num_warmup: iterations in which NUTS adapts its step size and metric.
        :param init_params: unconstrained values of the sites where to start, with the chains' axis
            first where there are several; those of deterministic sites are ignored.
        :param model_args: arguments of the model.
        :param model_kwargs: keyword arguments of the model.
        :raises ValueError: if ``init_params`` lacks a latent site, names one that the model does
            not have, or has values of another shape.
        """
        kwargs = model_kwargs or {}
        if num_warmup < LEAST_WARMUP and self._nuts["adapt_step_size"]:
            raise ValueError(
                f"FlowNUTS: expected num_warmup of at least {LEAST_WARMUP}, in which NUTS finds "
                f"its step size, got {num_warmup}. (The flow is learned before, and needs none.)"
            )
        self._num_warmup = num_warmup
        many = not is_prng_key(rng_key)
        strategy = self._init_strategy
        if self._potential_fn is not None:
            init_params, around = self._model_of(init_params, many)
            strategy = strategy or around
        # What `MCMC` tells a kernel of the run: as many draws as iterations of warm-up are likely.
        num_wanted = num_warmup * (len(rng_key) if many else 1)
        learned = self._learn(model_args, kwargs, num_wanted, strategy)
        built_for = (id(learned), num_warmup, many)
        if self._sample_fn is None or self._built_for != built_for:
            self._build(num_warmup, many)
            self._built_for = built_for
        if init_params is not None:
            chains = rng_key.shape[:1] if many else ()
            init_params = checked_start(learned.model, init_params, chains)
        begin = None
        if init_params is None and strategy is not None:
            model = learned.model._replace(init_strategy=strategy)
            begin = model.set_up(jax.random.key(0), model_args, kwargs).traced
        learned_map = self._map_at(learned.chosen, model_args, kwargs)
        return self._init_fn(rng_key, init_params, begin, learned_map)

    def _build(self, num_warmup: int, many: bool) -> None:
        """The programs that start one or many chains and move them on."""
        init, sample = hmc(potential_fn_gen=_potential_of, algo="NUTS")
        learned = self._known()
        good, wide = learned.ess >= GOOD_ENOUGH, learned.model.space.dim >= 50
        chosen_by_us = {
            "adapt_mass_matrix": not good,
            "target_accept_prob": 0.7 if good and wide else 0.8,
        }
        settings = {
            name: chosen_by_us[name] if value is None else value
            for name, value in self._nuts.items()
        }

        # Compiled as one: run bit by bit, its many small programs take seconds.
        @jit(once=True)
        def begin(
            rng_key: Array, init_params: Any, strategy: Traced | None, learned_map: LearnedMap
        ) -> FlowNUTSState:
            def chain(rng_key: Array, init_params: Any) -> HMCState:
                start_key, rng_key = jax.random.split(rng_key)
                start = start_of(start_key, init_params, strategy, learned_map)
                arguments = (learned_map,)
                return init(start, num_warmup, model_args=arguments, rng_key=rng_key, **settings)

            warped = (jax.vmap(chain) if many else chain)(rng_key, init_params)
            rng_key, warped = warped.rng_key, warped._replace(rng_key=None)
            no = jnp.zeros(warped.i.shape, bool)
            degrees = learned_map.density.degrees
            chosen = Chosen(learned_map.flow, learned_map.windings, degrees)
            z = self._sites(learned_map, warped.z)
            return FlowNUTSState(z, warped, chosen, no, jnp.zeros_like(warped.i), rng_key)

        self._init_fn = begin
        # A flow has one set of weights for all chains, which keeps its products matrix by matrix.
        self._sample_fn = jax.vmap(sample, in_axes=(0, None)) if many else sample

    def _sites(self, learned_map: LearnedMap, u: Array) -> Any:
        """Unconstrained values of the sites from points of the base space, ``(*batch, dim)``."""
        return self._as_given(learned_map.space.unpack(learned_map.to_latent(u)))

    def sample(
        self, state: FlowNUTSState, model_args: tuple, model_kwargs: dict[str, Any]
    ) -> FlowNUTSState:
        """One iteration of NUTS in the base space, and a jump if it is time for one."""
        arguments = (self._map_at(state.flow, model_args, model_kwargs),)
        many = not is_prng_key(state.rng_key)
        begun = state.warped._replace(rng_key=state.rng_key)
        # What is known of the point where warm-up ended may be of other arguments.
        refresh = functools.partial(self._refresh, arguments)
        begun = jax.lax.cond(
            begun.i.reshape(-1)[0] == self._num_warmup,
            jax.vmap(refresh) if many else refresh,
            lambda warped: warped,
            begun,
        )
        warped = self._sample_fn(begun, arguments)
        spent = state.num_gradients + warped.num_steps
        jumped = jnp.zeros_like(state.jumped)
        if self._jump_every:
            jump = functools.partial(self._jump, arguments)
            time = warped.i.reshape(-1)[0] % self._jump_every == 0
            warped, jumped = jax.lax.cond(
                time,
                jax.vmap(jump) if many else jump,
                lambda warped: (warped, jnp.zeros_like(state.jumped)),
                warped,
            )
            spent = spent + time
        z = self._sites(arguments[0], warped.z)
        rng_key, warped = warped.rng_key, warped._replace(rng_key=None)
        return FlowNUTSState(z, warped, state.flow, jumped, spent, rng_key)

    def _refresh(self, arguments: tuple, warped: HMCState) -> HMCState:
        """Energy and gradient at the current point, at these arguments."""
        energy, grad = jax.value_and_grad(_potential_of(*arguments))(warped.z)
        return warped._replace(potential_energy=energy, z_grad=grad)

    def _jump(self, arguments: tuple, warped: HMCState) -> tuple[HMCState, Array]:
        """An independence Metropolis step with the base distribution as proposal."""
        base, potential = arguments[0].base, _potential_of(*arguments)
        key, propose_key, accept_key = jax.random.split(warped.rng_key, 3)
        proposal = base.sample(propose_key)
        energy, grad = jax.value_and_grad(potential)(proposal)
        log_ratio = (warped.potential_energy + base.log_prob(warped.z)) - (
            energy + base.log_prob(proposal)
        )
        uniform = jax.random.uniform(accept_key, dtype=energy.dtype)
        accepted = jnp.log(uniform) < log_ratio  # false for NaN
        moved = warped._replace(z=proposal, potential_energy=energy, z_grad=grad)
        after = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, warped)
        return after._replace(rng_key=key), accepted

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict[str, Any]) -> Callable:
        """From unconstrained values to those of the latent and deterministic sites."""
        if self._learned is None or self._potential_fn:
            return lambda z: z
        density = self._learned.model.log_density(model_args, model_kwargs)
        return functools.partial(sites_of, density)

    def report(self, mcmc: MCMC | None = None) -> FlowNUTSReport:
        """What was learned, and with the run how it went.

        :param mcmc: the ``MCMC`` that ran this kernel.
        :raises ValueError: if nothing was learned yet, or ``mcmc`` ran another kernel.
        """
        learned = self._known()
        if mcmc is None:
            return report_of(learned)
        if mcmc.sampler is not self or mcmc.last_state is None:
            raise ValueError("mcmc: expected the `MCMC` that ran this kernel, after its run.")
        draws = mcmc.get_samples(group_by_chain=True)
        if self._potential_fn:
            draws = self._model.sites(draws)
        names = [name for name, _ in learned.model.space.shapes]
        run = report_of_run(mcmc, {name: draws[name] for name in names}, self._jump_every)
        return dataclasses.replace(report_of(learned), run=run)


def _minus(potential_fn: Callable[[Any], Any], values: Any, *args: Any, **kwargs: Any) -> Any:
    return -potential_fn(values)  # arguments of the run are for models, as under NUTS


def _potential_of(learned: LearnedMap) -> Callable[[Array], Array]:
    return lambda u: -learned.log_density(u)


def _same(one: Any, other: Any) -> bool:
    """Whether two flattened arguments are the same arrays, or equal where they are no arrays."""
    (leaves, structure), (others, another) = one, other
    return structure == another and all(
        a is b or (not hasattr(a, "shape") and not is_traced(a) and a == b)
        for a, b in zip(leaves, others, strict=True)
    )
