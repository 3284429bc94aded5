"""All uses of NumPyro's private attributes; ``tests/test_numpyro_private.py`` watches them."""

from typing import Any

from jax import Array
from numpyro.distributions import Distribution, MaskedDistribution
from numpyro.infer import util
from numpyro.infer.autoguide import AutoContinuous, AutoGuide


def frames_of(trace: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """Plates around the latent sites, and the full sizes of all plates, by name."""
    frames: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, site in trace.items():
        if site["type"] == "plate":
            sizes[name] = site["args"][0]
        if site["type"] == "sample" and not site["is_observed"]:
            frames |= {frame.name: frame for frame in site["cond_indep_stack"]}
    return frames, sizes


def adopt(guide: AutoGuide, trace: dict[str, dict[str, Any]]) -> None:
    """Give a guide what NumPyro's own set-up leaves on it."""
    guide.prototype_trace = trace
    guide._prototype_frames, guide._prototype_frame_full_sizes = frames_of(trace)


def warn_of_missing_plates(trace: dict[str, dict[str, Any]]) -> None:
    """NumPyro's own warning of batch axes without a plate."""
    util._validate_model(trace, plate_warning="loose")


def mask_of(fn: Distribution) -> bool | Array:
    """The mask of a distribution; True without one."""
    return fn._mask if isinstance(fn, MaskedDistribution) else True


def unpack(guide: AutoContinuous, latent: Array) -> dict[str, Array]:
    """Unconstrained values of the sites of any continuous guide."""
    return guide._unpack_latent(latent)


def sites_of(guide: AutoContinuous, latent: Array, params: dict[str, Any]) -> dict[str, Array]:
    """Latent and deterministic sites of any continuous guide."""
    return guide._unpack_and_constrain(latent, params)
