"""Well-known flows, each a short function from a key and a dimension to a distribution.

Every recipe has the form ``recipe(key, dim, *, context_dim=0, support=..., base=None, **options)``.
The key sets the initial weights alone: the static structure (permutations, where there are any)
follows from ``permutation_seed``, so a recipe runs under ``jit`` and ``vmap``, and
``jax.vmap(lambda key: recipe(key, dim))(keys)`` is an ensemble. A new flow is the identity.

``support`` is a constraint on the whole vector, a scalar one that holds for each coordinate, or a
tuple of scalar ones, one per coordinate. Angles (``constraints.circular``) need circular maps,
which ``nsf`` and ``nsf_ar`` have. Discrete coordinates (``constraints.integer_interval(0, 4)``,
``constraints.boolean``) make a :class:`~numpyro_flows.mixed.MixedFlow` with exact masses, of all
recipes of coupling and autoregressive layers. ``inverse`` says which direction is the fast one:
True for the density (training on data), False for sampling (guides).

===========================  ===================================================================
structure                    presets
===========================  ===================================================================
:func:`coupling_flow`        :func:`nice`, :func:`realnvp`, :func:`nsf`
:func:`autoregressive_flow`  :func:`maf`, :func:`iaf`, :func:`nsf_ar`
:func:`residual_flow`        :func:`planar`, :func:`radial`, :func:`sylvester`, :func:`bnaf`
:func:`cnf`                  :func:`augmented_cnf`
:func:`glow`                 none; its data are images
:func:`markov`               any conditional flow of frames, along time
===========================  ===================================================================

A recipe of your own is a function of this form; :func:`preset` completes one that passes the
options of a structure on, and :func:`in_guides` declares what guides set.
"""

from ._building import channel_permutations as channel_permutations
from ._options import AutoregressiveOptions as AutoregressiveOptions
from ._options import ContinuousOptions as ContinuousOptions
from ._options import CouplingOptions as CouplingOptions
from ._options import FlowOptions as FlowOptions
from ._options import LayerOptions as LayerOptions
from ._options import ResidualOptions as ResidualOptions
from ._options import Support as Support
from ._options import in_guides as in_guides
from ._options import preset as preset
from .autoregressive import autoregressive_flow as autoregressive_flow
from .autoregressive import iaf as iaf
from .autoregressive import maf as maf
from .autoregressive import nsf_ar as nsf_ar
from .continuous import augmented_cnf as augmented_cnf
from .continuous import cnf as cnf
from .coupling import conditional_gaussian as conditional_gaussian
from .coupling import coupling_flow as coupling_flow
from .coupling import nice as nice
from .coupling import nsf as nsf
from .coupling import realnvp as realnvp
from .images import glow as glow
from .images import grey_levels as grey_levels
from .residual import bnaf as bnaf
from .residual import planar as planar
from .residual import radial as radial
from .residual import residual_flow as residual_flow
from .residual import sylvester as sylvester
from .signals import Flat as Flat
from .signals import markov as markov
