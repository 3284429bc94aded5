"""The state of a chain of ``FlowNUTS``."""

from typing import Any, NamedTuple

from jax import Array
from numpyro.infer.hmc import HMCState

from ..learning import Chosen


class FlowNUTSState(NamedTuple):
    """State of a chain; NumPyro's names for what ``extra_fields`` asks for work as with NUTS.

    :ivar z: unconstrained values of the model's sites, or of a potential energy's pytree.
    :ivar warped: NUTS's own state, in the flow's base space.
    :ivar flow: the map from there to the sites.
    :ivar jumped: whether this iteration ended with an accepted jump.
    :ivar num_gradients: gradients of the model so far, warm-up included.
    :ivar rng_key: random key of the chain.
    """

    z: Any
    warped: HMCState
    flow: Chosen
    jumped: Array
    num_gradients: Array
    rng_key: Array

    def __getattr__(self, name: str) -> Any:
        if name in HMCState._fields:
            return getattr(self.warped, name)
        raise AttributeError(name)
