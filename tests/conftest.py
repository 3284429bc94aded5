"""Shared fixtures and helpers."""

import jax
import jax.numpy as jnp
import pytest

_compiled = 0


def _count(event, _, **rest):
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs, mostly at the end of a file: each keeps a megabyte or two.

    And some fifteen memory maps, of which Linux lets a process have 65,530; at that limit the
    compiler is killed.
    """
    global _compiled
    at_end = nextitem is None or nextitem.path != item.path
    if _compiled > (300 if at_end else 1500):
        jax.clear_caches()
        _compiled = 0


#: Files that take longest, which workers begin with, so that no long one is left at the end.
LONGEST = (
    "test_contract",
    "test_continuous",
    "test_guide",
    "test_zoo",
    "test_kernel",
    "test_augmented",
    "test_reparam",
    "test_recipes",
    "test_preconditioner",
    "test_dequantization",
    "test_images",
    "test_fit_guide",
)


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The test runs in both precisions; float64 mode is on for the second."""
    with _x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture
def x64():
    with _x64(True):
        yield


class _x64:
    def __init__(self, value: bool):
        self.value = value

    def __enter__(self):
        self.before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", self.value)

    def __exit__(self, *_):
        jax.config.update("jax_enable_x64", self.before)
