"""``fit_guide``: train a guide with defaults that need no tuning, and judge the result."""

import copy
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from tqdm.auto import tqdm

from ..checks import check_key, check_size
from ..compilation import split
from ..training.checkpoint import Checkpoint
from ..training.mesh import Split, automatic, split_over
from ..training.processes import is_first
from .arguments import split_arguments
from .density import check_summable, hidden_sites, own_params
from .export import to_arviz
from .guides import AutoFlow
from .importance import Resampled, importance_resample
from .nonfinite import blame
from .reparam import NeuTraReparam
from .train import NeverFinite, Trained, train
from .trainers import LatentTrainer, SVITrainer, Trainer


@dataclasses.dataclass(frozen=True, repr=False)
class GuideFit(Trained):
    """A fitted guide, as :func:`fit_guide` returns it; ``print`` it for the verdict.

    :ivar guide: the guide.
    :ivar args: arguments of the model that it was fitted to.
    :ivar kwargs: keyword arguments of the model.
    """

    guide: AutoGuide
    args: tuple
    kwargs: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What may be relied on, and the figures: the guide's draws, reweighted ones, or neither.

        "Reliable" is what :attr:`trusted` says of the guide's own draws, "reliable when reweighted"
        what :attr:`is_covered` says of :meth:`resample`.
        """
        figures = (
            f"ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}, importance ESS {self.ess:.0%}, "
            f"k-hat {self.khat:.2f}"
        )
        if self.is_noisy:
            return (
                f"not judged: ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}. The importance "
                "weights have the noise of rows drawn at random, since the model cannot be run on "
                "all rows with these arguments. Judge the guide with all rows: "
                "`nf.importance_log_weights(key, guide, params, ...)`."
            )
        if self.improper:
            return (
                f"not reliable: {figures}. The posterior seems to be improper: far out along "
                f"{', '.join(map(repr, self.improper))} its density does not fall. Give these "
                "sites proper priors."
            )
        skipped = f"; {self.num_skipped} steps skipped" if self.num_skipped else ""
        if self.trusted:
            return f"reliable: {figures}{skipped}."
        if self.is_covered:
            mean, log_sd = self.shifts
            return (
                f"reliable when reweighted, not as drawn: {figures}{skipped}. Importance weights "
                f"move the mean of {mean.name} by {mean.value:.2f} +- {mean.error:.2f} standard "
                f"deviations and the log sd of {log_sd.name} by {log_sd.value:.2f} +- "
                f"{log_sd.error:.2f}. Take draws from `fitted.resample(key)`, with the error of "
                f"{self.ess:.0%} as many, or train longer, or take a richer flow."
            )
        return (
            f"not reliable: {figures}{skipped}. The guide misses mass: train longer, take a "
            "richer flow, or sample with `nf.NeuTraReparam`."
        )

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return (
            f"GuideFit({type(self.guide).__name__}, {len(self.losses)} steps, "
            f"{self.verdict.partition(':')[0]}, ELBO {self.elbo:.3f}, "
            f"ESS {self.ess:.0%}, k-hat {self.khat:.2f})"
        )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Draws of the guide.

        :param key: ``jax.random.key``.
        :param sample_shape: leading shape of the draws.
        :return: dict from latent and deterministic sites to ``(*sample_shape, *site_shape)``.
        """
        return self.guide.sample_posterior(
            check_key(key), self.params, *self.args, sample_shape=tuple(sample_shape), **self.kwargs
        )

    def resample(
        self, key: Array, num_samples: int = 1000, *, num_proposals: int | None = None
    ) -> Resampled:
        """Draws corrected by importance weights; see :func:`~numpyro_flows.importance_resample`."""
        return importance_resample(
            key,
            self.guide,
            self.params,
            *self.args,
            num_samples=num_samples,
            num_proposals=num_proposals,
            **self.kwargs,
        )

    def to_arviz(
        self,
        key: Array | None = None,
        *,
        num_samples: int = 1000,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str | None]] | None = None,
        constant_data: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draws for ArviZ, with predictions; see :func:`~numpyro_flows.to_arviz`."""
        return to_arviz(
            self.guide,
            self.params,
            *self.args,
            key=key,
            num_samples=num_samples,
            coords=coords,
            dims=dims,
            constant_data=constant_data,
            **self.kwargs,
        )

    def neutra(self) -> NeuTraReparam:
        """Neural transport through this guide, for HMC: ``fitted.neutra().reparam(model)``."""
        return NeuTraReparam(self.guide, self.params)


def fit_guide(
    key: Array,
    guide: AutoGuide,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int | None = None,
    learning_rate: float | None = None,
    elbo: ELBO | None = None,
    annealing_steps: int = 0,
    init_params: dict[str, Any] | None = None,
    target_ess: float = 0.99,
    num_draws: int = 10_000,
    mesh: Mesh | None = None,
    progress_bar: bool = True,
    checkpoint: str | os.PathLike | None = None,
    **kwargs: Any,
) -> GuideFit:
    r"""Train a guide and say whether to trust it.

    ``SVI`` underneath, with Adam, gradients clipped by their global norm, a learning rate that
    rises over the first 200 steps and falls over the last half as a cosine, and steps left out
    whose value or gradient is not finite. The fall begins earlier, and training ends earlier, once
    the loss has ceased to fall or the importance weights are nearly equal. If the result of an
    early end cannot be trusted, or is less than was expected, training goes on. What is returned is
    the better of the last parameters and the best seen before, judged by fresh draws. Arrays among
    the model's arguments are arguments of the compiled program, not baked into it. The losses of
    continuous flows contain their penalties. NumPyro keeps its handlers on one stack per process:
    fit in several processes at once, not in several threads of one.

    :param key: ``jax.random.key``.
    :param guide: an automatic guide, ``nf.AutoFlow`` or NumPyro's; it need not be set up.
    :param args: arguments of the model and the guide, as are the other keyword arguments.
    :param num_steps: largest number of steps, 8,000 by default; simple posteriors end far earlier.
    :param num_particles: draws per step; by default 128 up to 200 dimensions, then fewer.
    :param learning_rate: the largest, 3e-3 by default.
    :param elbo: the objective, ``nf.STL_ELBO`` by default, or ``TraceEnum_ELBO`` for a guide whose
        model hides discrete sites by ``handlers.block``; with one given, ``num_particles`` is its
        own.
    :param annealing_steps: over so many first steps the model's log density is multiplied by a
        factor that rises linearly from 0.01 to 1, so that the guide meets separate modes before it
        settles in one (Rezende & Mohamed, 2015, arXiv:1505.05770, eq. 20); 0 for none.
    :param init_params: parameters to start from, as an earlier fit returned them; those it lacks
        start as without it.
    :param target_ess: importance ESS, in (0, 1), at which training may come to its end; read off
        the spread of the losses.
    :param num_draws: draws from which ELBO, k-hat and ESS are computed.
    :param mesh: ``jax.sharding.Mesh`` whose first axis splits the particles, with the result that
        one device gives; for ``nf.AutoFlow`` and its own objective. Arguments of the model that are
        split over devices stay where they are: then each device computes all particles for the
        rows that it has.
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after every 100 steps. If it is there, training goes
        on from it, with the result the uninterrupted call would have had. The model's code is not
        compared, only its arguments, the guide's parameters at the start and the settings.
    :raises TypeError: for a guide that is no ``AutoGuide``, an objective that is no ELBO, or a key
        that is not one.
    :raises ValueError: if both an objective and a number of particles are given, for numbers that
        are not positive, if the model hides a discrete site that cannot be summed out, or if the
        loss was never finite.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> guide = nf.AutoFlow(model, nf.realnvp)
    >>> fitted = nf.fit_guide(jax.random.key(0), guide, num_steps=100, progress_bar=False)
    >>> fitted.trusted
    True
    """
    check_key(key)
    if not isinstance(guide, AutoGuide):
        raise TypeError(
            f"guide: expected an automatic guide such as `nf.AutoFlow(model)`, got "
            f"{type(guide).__name__}. A guide of your own trains with `numpyro.infer.SVI`."
        )
    if elbo is not None and num_particles is not None:
        raise ValueError(
            "num_particles: an objective was given, and has its own number of particles."
        )
    if not isinstance(elbo, ELBO | None):
        raise TypeError(
            f"elbo: expected an objective such as `Trace_ELBO(num_particles=16)`, got {elbo!r}."
        )
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}.")
    if num_particles is not None:
        check_size("num_particles", num_particles)
    num_steps = 8000 if num_steps is None else check_size("num_steps", num_steps)
    check_size("num_draws", num_draws)
    check_size("annealing_steps", annealing_steps, minimum=0)
    if not 0 < target_ess < 1:
        raise ValueError(f"target_ess: expected a number in (0, 1), got {target_ess}.")
    args, kwargs = automatic((args, kwargs))
    over = None if mesh is None else split_over(mesh, "num_particles", num_particles)
    train_key, judge_key, *_ = split(key, 4)
    trainer = _trainer(train_key, guide, args, kwargs, elbo, num_particles, init_params or {}, over)

    def store(begun: Any) -> Checkpoint:
        known = [num_steps, learning_rate, annealing_steps, target_ess, trainer.num_particles, elbo]
        arrays, static = split_arguments(args, kwargs)
        # NumPyro orders what is in a distribution anew in each process.
        words = sorted(re.findall(r"\w+", f"{static.leaves} {jax.tree.structure(begun)}"))
        pieces = begun, arrays
        path: Any = checkpoint
        return Checkpoint(path, [*known, words], key, pieces, shared=over is not None)

    try:
        trained = train(
            trainer,
            judge_key,
            num_steps=num_steps,
            learning_rate=3e-3 if learning_rate is None else learning_rate,
            annealing_steps=annealing_steps,
            target_ess=target_ess,
            num_draws=num_draws,
            progress_bar=progress_bar and (over is None or is_first()),
            store=None if checkpoint is None else store,
        )
    except NeverFinite as error:
        found = blame(judge_key, guide, error.params, args, kwargs)
        raise NeverFinite(error.params, found) from error
    return GuideFit(**vars(trained), guide=guide, args=args, kwargs=kwargs)


def fit_guides(
    key: Array,
    guide: AutoGuide,
    list_of_args: Sequence[tuple],
    *,
    progress_bar: bool = True,
    **settings: Any,
) -> list[GuideFit]:
    """Fit copies of a guide, one for each of many data sets.

    Fit i is ``nf.fit_guide(jax.random.fold_in(key, i), guide, *list_of_args[i])``. Data of the same
    shapes share all programs, so that the first fit alone compiles.

    :param key: ``jax.random.key``.
    :param guide: a guide that is not set up; it stays so.
    :param list_of_args: for each data set a tuple of the model's arguments.
    :param progress_bar: whether to show one, of the data sets.
    :param settings: as for ``nf.fit_guide``, keyword arguments of the model included.
    :raises TypeError: for arguments that are no tuples; as :func:`fit_guide`.
    :raises ValueError: as :func:`fit_guide`.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model(y):
    ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
    >>> fits = nf.fit_guides(jax.random.key(0), nf.AutoFlow(model), [(1.0,), (2.0,)],
    ...                      progress_bar=False)
    >>> [fitted.trusted for fitted in fits]
    [True, True]
    """
    check_key(key)
    for args in list_of_args:
        if not isinstance(args, tuple):
            raise TypeError(
                f"list_of_args: expected a tuple of arguments for each data set, got a "
                f"{type(args).__name__}. One array y is the tuple `(y,)`."
            )
    bar = tqdm(list_of_args, disable=not progress_bar, desc="fit_guides")
    return [
        fit_guide(
            jax.random.fold_in(key, i), copy.copy(guide), *args, progress_bar=False, **settings
        )
        for i, args in enumerate(bar)
    ]


def _trainer(
    key: Array,
    guide: AutoGuide,
    args: tuple,
    kwargs: dict[str, Any],
    elbo: ELBO | None,
    num_particles: int | None,
    init_params: dict[str, Any],
    over: Split | None,
) -> Trainer:
    hidden = hidden_sites(guide.model, args, kwargs)
    check_summable(hidden)
    summed = all(site["fn"].has_enumerate_support for site in hidden.values())
    if isinstance(guide, AutoFlow):
        set_up_key, key, *_ = split(key, 4)
        begun = guide.set_up(set_up_key, args, kwargs)
        if elbo is None and summed and not own_params(guide.prototype_trace):
            return LatentTrainer(key, guide, begun, num_particles, init_params, over)
    if over is not None:
        raise ValueError(
            "mesh: particles are split for an `nf.AutoFlow` without discrete sites and without an "
            "objective of your own. For others leave it out, and split the rows of the model's "
            "arguments over devices: they stay where they are."
        )
    return SVITrainer(key, guide, args, kwargs, elbo, num_particles, init_params)
