"""Shared fixtures and helpers."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_MAPS = pathlib.Path("/proc/self/maps")


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs at the end of a file, with which a worker grows to gigabytes.

    And before they exhaust what Linux lets a process map: each program holds some memory maps; at
    the limit (usually 65,530) the compiler is killed.
    """
    at_end = nextitem is None or nextitem.path != item.path
    if at_end or (
        _LIMIT.exists() and _MAPS.read_bytes().count(b"\n") > int(_LIMIT.read_text()) // 2
    ):
        jax.clear_caches()


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
