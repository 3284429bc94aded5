"""The evidence of a model from draws of its posterior that are at hand, by a flow and a bridge."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to
from scipy.special import logsumexp

from ..checks import check_key, check_size
from ..compilation import jit, split
from ..diagnostics import importance_ess, psis_khat
from ..distribution import FlowDistribution
from ..transforms import FixedAffine
from .centring import degrees_of
from .fisher import affine_of_moments, fit_likelihood
from .guide_flow import guide_flow
from .guides import AutoFlow
from .latent_space import LatentSpace
from .maps import BATCH, LearnedMap, draw
from .recentre import rows_from_latent
from .supports import Winding

#: Fewest draws from which a flow and a bridge are made.
LEAST: Final = 100
#: Importance ESS of the flow's draws below which flow and posterior hardly meet.
MEETING: Final = 0.01
#: Largest error of a log evidence that is worth a number.
LARGEST_ERROR: Final = 0.5


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A log evidence with its error, as :func:`log_evidence` returns it; ``print`` it.

    :ivar log_evidence: logarithm of the model's evidence, in nats.
    :ivar error: its standard error, in nats, with the autocorrelation of the draws in it.
    :ivar ess: importance ESS of the flow's draws for the posterior, as a fraction.
    :ivar khat: Pareto shape of these importance weights.
    :ivar num_effective: effective number of the posterior draws that the bridge used.
    """

    log_evidence: float
    error: float
    ess: float
    khat: float
    num_effective: float

    @property
    def trusted(self) -> bool:
        """Whether flow and draws meet, so that the error is one."""
        return self.ess >= MEETING and self.error <= LARGEST_ERROR

    def __str__(self) -> str:
        figures = (
            f"log evidence {self.log_evidence:.3f} +- {self.error:.3f}, importance ESS of the flow "
            f"{self.ess:.0%}, k-hat {self.khat:.2f}, {self.num_effective:.0f} effective draws"
        )
        if self.trusted:
            return f"{figures}."
        return (
            f"not reliable: {figures}. The flow and the draws hardly meet: give more draws or a "
            "richer flow, and look at R-hat of the draws."
        )


class _Guide(AutoFlow):
    """A guide that knows the model's latent space; errors name the function."""

    title = "log_evidence"


def log_evidence(
    samples: Mapping[str, Any],
    model: Callable,
    *args: Any,
    flow: Callable[..., FlowDistribution] = guide_flow,
    num_draws: int = 10_000,
    key: Array | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Evidence:
    r"""Log evidence of a model from draws of its posterior, of any sampler.

    A flow q is fitted by maximum likelihood to the first half of the draws, over the unconstrained
    latent space. The second half and fresh draws of q make the bridge of least error between p, the
    joint density, and q:

    .. math:: Z = \frac{E_q[p \, h]}{E_{p / Z}[q \, h]}, \qquad
        h \propto \frac{1}{n_1 \, p / Z + n_2 \, q},

    solved for Z by iteration, with :math:`n_1` the effective number of the posterior draws. It is
    right for any q, with an error that grows as q and the posterior part. The priors of the model
    have to be normalised; what a sampler has missed, a mode for example, is missed here too.

    Cost: the fit, some seconds, and one pass of the model for each draw, no gradients.

    Sources: Meng & Wong (1996), eq. 4.1; for the error Frühwirth-Schnatter (2004),
    doi:10.1111/j.1368-423X.2004.00125.x; the iteration as Gronau et al. (2017), arXiv:1703.05984.

    :param samples: values of the latent sites by name, each ``(n, *shape)`` or
        ``(chains, n, *shape)``, as ``mcmc.get_samples(group_by_chain=True)`` returns them; other
        sites are ignored. Without chains, the draws count as one, in their order.
    :param model: the NumPyro model.
    :param args: its arguments, data included, as are the other keyword arguments.
    :param flow: a recipe, as for ``nf.AutoFlow``.
    :param num_draws: draws of the flow.
    :param key: ``jax.random.key`` for the fit and the flow's draws; one of zero by default.
    :param progress_bar: whether the fit shows one.
    :raises ValueError: if a latent site is missing or of another shape, for fewer than 100 draws,
        for draws that do not move, that lie on the boundary of a support or at which the density
        is not finite, and for a model with discrete latent sites or none.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model(y):
    ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> draws = 0.5 + 0.5**0.5 * jax.random.normal(jax.random.key(0), (2000,))
    >>> found = nf.log_evidence({"mean": draws}, model, 1.0, progress_bar=False)
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(1.0)
    >>> bool(abs(found.log_evidence - exact) < 0.01), found.trusted
    (True, True)
    """
    check_size("num_draws", num_draws, minimum=LEAST)
    key = jax.random.key(0) if key is None else check_key(key)
    up_key, build_key, fit_key, rest_key = split(key, 4)
    turn_key, draw_key, locate_key, _ = split(rest_key, 4)
    guide = _Guide(model, flow)
    begun = guide.set_up(up_key, args, kwargs)
    sites, chains = _checked(samples, guide.prototype_trace, guide.space)
    centre = jnp.zeros(guide.latent_dim)
    wide = guide.space.windings(centre)
    u = np.asarray(_unconstrained(guide.space, wide, sites, turn_key))
    if not (finite := np.isfinite(u).all(axis=1)).all():
        raise ValueError(
            f"samples: {(~finite).sum()} of {len(u)} draws lie on the boundary of a support, where "
            "the unconstrained value is infinite. Draw in float64, or leave them out."
        )
    u = u.reshape(chains, -1, guide.latent_dim)
    halves = np.split(u, [u.shape[1] // 2], axis=1)
    first, second = (jnp.asarray(half.reshape(-1, guide.latent_dim)) for half in halves)
    moves = guide.space.unpack(np.ptp(np.asarray(first), axis=0) > 0)
    if still := [name for name, each in moves.items() if not each.all()]:
        raise ValueError(
            f"samples: the draws of site {still[0]!r} do not move. The chain is stuck, or its "
            "values are held fixed: condition the model on them, `numpyro.handlers.condition`."
        )
    density = begun.density
    if density.hierarchy.sites:
        # In the coordinates of the model's hierarchy the flow has less to learn.
        density = density.centred(degrees_of(guide.locate(locate_key, begun).affine))
        first, second = (rows_from_latent(density, half) for half in (first, second))
    affine = affine_of_moments(FixedAffine(centre, jnp.ones_like(centre)), first)
    fresh = guide.initial_flow(build_key)
    params = fit_likelihood(fit_key, fresh, guide.rest, affine, first, progress_bar)
    learned = LearnedMap(density, guide.flow(params, affine), wide)
    of_posterior = np.asarray(_log_ratios(learned, second), float)
    if not np.isfinite(of_posterior).all():
        raise ValueError(
            f"samples: at {(~np.isfinite(of_posterior)).sum()} of {len(second)} draws the model's "
            "log density is not finite. Are they draws of this model with these arguments?"
        )
    drawn = draw(learned, draw_key, num_draws)
    of_flow = np.asarray(drawn.log_p, float) - np.asarray(drawn.log_q, float)
    return _bridge(of_posterior.reshape(chains, -1), np.nan_to_num(of_flow, nan=-np.inf))


def _checked(
    samples: Mapping[str, Any], trace: Mapping[str, Any], space: LatentSpace
) -> tuple[dict[str, Array], int]:
    """Values of the latent sites, ``(n, *shape)`` with the chains one after another, and these."""
    leading, sites = set(), {}
    for name, _ in space.shapes:
        if name not in samples:
            raise ValueError(
                f"samples: no draws of the latent site {name!r}; there are {sorted(samples)}."
            )
        shape, value = jnp.shape(trace[name]["value"]), jnp.asarray(samples[name])
        axes = value.ndim - len(shape)
        if axes not in (1, 2) or value.shape[axes:] != shape:
            raise ValueError(
                f"samples: expected draws of site {name!r} of shape (n, *{shape}) or "
                f"(chains, n, *{shape}), got {value.shape}."
            )
        leading.add(value.shape[:axes])
        sites[name] = value.reshape(-1, *shape)
    if len(leading) > 1:
        raise ValueError(f"samples: the sites have different numbers of draws: {sorted(leading)}.")
    (lead,) = leading
    if (num := int(np.prod(lead))) < LEAST:
        raise ValueError(f"samples: expected at least {LEAST} draws, got {num}.")
    return sites, lead[0] if len(lead) == 2 else 1


@jit(once=True)
def _unconstrained(
    space: LatentSpace, windings: dict[str, Winding], sites: dict[str, Array], key: Array
) -> Array:
    """Draws on the line, ``(n, dim)``, with what is auxiliary there drawn from its own density."""
    found = {}
    for number, (name, value) in enumerate(sites.items()):
        turn_key, idle_key = jax.random.split(jax.random.fold_in(key, number))
        if name in windings:
            found[name] = windings[name].unwind(turn_key, value)
            continue
        found[name] = biject_to(space.supports[name]).inv(value)
        if name in space.idle:
            noise = jax.random.normal(idle_key, found[name].shape)
            where = space.idle[name]
            where = where.reshape(where.shape + (1,) * (noise.ndim - 1 - where.ndim))
            found[name] = jnp.where(where, noise, found[name])
    return space.pack(found)


@jit(once=True)
def _log_ratios(learned: LearnedMap, u: Array) -> Array:
    """Log densities of the model at rows on the line, less those of the flow."""

    def one(u: Array) -> Array:
        return learned.density.unwound(u, learned.windings) - learned.flow.log_prob(u)

    return jax.lax.map(one, u, batch_size=BATCH)


def _bridge(of_posterior: np.ndarray, of_flow: np.ndarray) -> Evidence:
    """The bridge between draws of the posterior, ``(chains, n)``, and of the flow, ``(n,)``.

    :param of_posterior: log ratios of the joint density to the flow's at the posterior's draws.
    :param of_flow: the same at the flow's draws.
    """
    own = min(_effective(of_posterior), of_posterior.size)
    s1, s2 = np.log(own / (own + of_flow.size)), np.log(of_flow.size / (own + of_flow.size))
    log_z, before = float(np.median(of_posterior)), np.inf
    for _ in range(1000):
        if abs(log_z - before) < 1e-9:
            break
        before = log_z
        # Both means of h, with the logarithm of the ratio p / (q Z) taken to the one side.
        at_flow = of_flow - log_z - np.logaddexp(s1 + of_flow - log_z, s2)
        at_posterior = -np.logaddexp(s1 + of_posterior - log_z, s2)
        log_z += logsumexp(at_flow) - np.log(at_flow.size)
        log_z -= logsumexp(at_posterior) - np.log(at_posterior.size)
    f1 = np.exp(at_flow - at_flow.max())
    f2 = np.exp(at_posterior - at_posterior.max())
    squared = f1.var() / f1.mean() ** 2 / f1.size
    squared += f2.var() / f2.mean() ** 2 / min(_effective(f2), f2.size)
    return Evidence(log_z, float(squared**0.5), importance_ess(of_flow), psis_khat(of_flow), own)


def _effective(series: np.ndarray) -> float:
    """Effective number of the draws of some chains, ``(chains, n)``, for their mean."""
    import arviz  # slow to import

    if np.ptp(series) == 0:
        return float(series.size)
    return float(np.asarray(arviz.ess(series, method="mean")))
