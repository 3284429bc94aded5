"""Pictures with matplotlib: training curves, draws beside a reference, base space, calibration.

Every function draws into the axes that it is given, or into a new figure, and returns the axes, so
that titles, limits and files are matplotlib's own: ``nf.plot.losses(fitted).figure.savefig(path)``.
matplotlib comes with ``pip install 'numpyro_flows[plot]'``.

- :func:`losses`: the curves of ``nf.fit`` and ``nf.fit_guide``;
- :func:`scatter`, :func:`pairs`: draws beside a reference or the truth, in two coordinates or in
  each pair of many;
- :func:`base`, :func:`spaces`: draws in the base space of a flow, alone or beside their images;
- :func:`ranks`, :func:`coverage`: whether posteriors of simulated data are calibrated;
- :func:`images`: rows of images.
"""

from .calibration import coverage as coverage
from .calibration import ranks as ranks
from .curves import losses as losses
from .draws import pairs as pairs
from .draws import scatter as scatter
from .pixels import images as images
from .transport import base as base
from .transport import spaces as spaces
