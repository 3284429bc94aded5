"""Options of recipes as types, presets with complete signatures, and settings for guides."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import (
    Any,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from jax import Array
from numpyro.distributions import Distribution
from numpyro.distributions.constraints import Constraint

from ..transforms.autoregressive import Graph

Support: TypeAlias = Constraint | Sequence[Constraint]

Recipe = TypeVar("Recipe", bound=Callable[..., Any])


class LayerOptions(TypedDict, total=False):
    """Options of stacked layers with conditioners, without those of the whole flow."""

    context_dim: int
    permutation_seed: int
    depth: int
    hidden: Sequence[int]
    activation: str
    residual: bool
    permutation: str | Sequence[int]


class FlowOptions(LayerOptions, total=False):
    """Options of all flows of such layers."""

    support: Support
    base: Distribution | None


class CouplingOptions(FlowOptions, total=False):
    """Options of ``coupling_flow`` for presets that choose the elementwise map."""

    mixing: str


class AutoregressiveOptions(FlowOptions, total=False):
    """Options of ``autoregressive_flow`` for presets that choose map and direction."""

    parents: Graph | None


class ResidualOptions(TypedDict, total=False):
    """Options of ``residual_flow`` for presets that choose the layer and the depth."""

    context_dim: int
    support: Support
    base: Distribution | None
    hidden: Sequence[int]
    inverse: bool


class ContinuousOptions(TypedDict, total=False):
    """Options of ``cnf`` for presets that choose context and support."""

    base: Distribution | None
    hidden: Sequence[int]
    activation: str
    field: Callable[..., Array] | None
    trace: str | None
    noise: str
    num_probes: int
    solver: str
    rtol: float
    atol: float
    num_steps: int | None
    max_steps: int
    adjoint: str
    end_time: float
    per_row: bool
    kinetic_penalty: float
    jacobian_penalty: float
    steer: float
    throw: bool


def in_guides(**settings: Any) -> Callable[[Recipe], Recipe]:
    """Declare arguments that guides set, where the user leaves them open.

    A guide needs fast sampling, an exact density, and no exception where a step of training can be
    skipped.

    :param settings: arguments of the decorated recipe, kept as its ``guide_settings``.

    >>> @in_guides(inverse=False)
    ... def mine(key, dim, *, inverse=True): ...
    >>> mine.guide_settings
    {'inverse': False}
    """

    def declare(recipe: Recipe) -> Recipe:
        recipe.__dict__["guide_settings"] = settings
        return recipe

    return declare


def preset(structure: Callable[..., Any]) -> Callable[[Recipe], Recipe]:
    """Complete a recipe that passes ``**options: Unpack[...]`` on to another one.

    The signature of the decorated recipe names the options one by one with their defaults, its
    docstring has the structure's ``:param:`` entry of each argument that it does not describe
    itself, and guides set what they set of the structure. Type checkers read the ``TypedDict``.
    A call with any other argument raises ``TypeError``.

    :param structure: the recipe that the options are passed to.
    :raises TypeError: for a recipe without such options, or options that the structure lacks.

    >>> import inspect, numpyro_flows as nf
    >>> @preset(nf.coupling_flow)
    ... def skewed(key, dim, **options: Unpack[CouplingOptions]):
    ...     return nf.coupling_flow(key, dim, nf.elementwise.SinhArcsinh(), **options)
    >>> inspect.signature(skewed).parameters["depth"].default
    8
    """

    def complete(recipe: Recipe) -> Recipe:
        signature = _completed_signature(recipe, structure)
        names = list(signature.parameters)

        @functools.wraps(recipe)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs.keys() - names:
                raise TypeError(_unexpected(recipe.__name__, name, names))
            return recipe(*args, **kwargs)

        vars(checked)["__signature__"] = signature
        checked.__doc__ = _completed_doc(recipe.__doc__, structure.__doc__, names)
        settings = getattr(structure, "guide_settings", {})
        inherited = {name: value for name, value in settings.items() if name in names}
        return cast(Recipe, in_guides(**inherited)(checked) if inherited else checked)

    return complete


def _completed_signature(
    recipe: Callable[..., Any], structure: Callable[..., Any]
) -> inspect.Signature:
    """The recipe's signature with the options in place of ``**options``, as the structure has them.

    In the structure's order, followed by what is the recipe's own.
    """
    signature = inspect.signature(recipe)
    own = dict(signature.parameters)
    rest = next((own.pop(p.name) for p in own.values() if p.kind is p.VAR_KEYWORD), None)
    annotation = get_type_hints(recipe).get(rest.name) if rest else None
    if get_origin(annotation) is not Unpack:
        raise TypeError(
            f"preset: expected {recipe.__name__} to end with `**options: Unpack[...]` of a "
            f"TypedDict, got {signature}."
        )
    (options,) = get_args(annotation)
    theirs = inspect.signature(structure).parameters
    if unknown := sorted(options.__optional_keys__ - theirs.keys()):
        raise TypeError(f"preset: {options.__name__} has {unknown}, which {structure} lacks.")
    taken = {n: p for n, p in theirs.items() if n in own or n in options.__optional_keys__}
    parameters = sorted((taken | own).values(), key=lambda parameter: parameter.kind)
    return signature.replace(parameters=parameters)


_ENTRY = re.compile(r"^:param (\w+):.*\n(?:[ ]+.*\n)*", re.MULTILINE)


def _completed_doc(own: str | None, theirs: str | None, names: Sequence[str]) -> str | None:
    """The docstring with an entry for each of the names, from the other one where it has none."""
    if own is None or theirs is None:  # under `python -OO`
        return own
    own, theirs = (inspect.cleandoc(doc) + "\n" for doc in (own, theirs))
    entries = {match[1]: match[0] for doc in (theirs, own) for match in _ENTRY.finditer(doc)}
    first = re.search("^:(?:param|return|raises)", own, re.MULTILINE)
    place = first.start() if first else len(own)
    before, after = own[:place], _ENTRY.sub("", own[place:])
    if first is None:
        before += "\n"
    return before + "".join(entries.get(name, "") for name in names) + after


def _unexpected(recipe: str, name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}."
    return f"{recipe}() got an unexpected keyword argument {name!r}; {hint}"
