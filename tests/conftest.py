"""Shared fixtures and helpers."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_MAPS = pathlib.Path("/proc/self/maps")


def pytest_runtest_teardown():
    """Forget compiled programs before they exhaust what Linux lets a process map.

    Each program holds some memory maps; at the limit (usually 65,530) the compiler is killed.
    """
    if _LIMIT.exists() and _MAPS.read_bytes().count(b"\n") > int(_LIMIT.read_text()) // 2:
        jax.clear_caches()


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
