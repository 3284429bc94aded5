"""What the tests' processes set before JAX is imported."""

import gc
import os
import pathlib
import subprocess
import sys

# Most of the suite's time is spent compiling small programs. Optimising them does not pay, nor do
# XLA's newer emitters of fused loops and splitting a program to compile it in parallel: without
# them compilation takes a third. Workers share what they compiled, also with the next run.
_LIGHT = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def _known(*flags: str) -> bool:
    """Whether this jaxlib knows the flags; it ends the process over one that it does not."""
    command = [sys.executable, "-c", "import jax; jax.device_put(0)"]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}
    return subprocess.run(command, env=env, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:  # workers inherit the first one's answer
    os.environ["XLA_FLAGS"] = " ".join(_LIGHT if _known(*_LIGHT) else filter(_known, _LIGHT))
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes millions of small objects, few of them garbage in cycles: looking for those after
# every 700 new ones, as Python does, is a tenth of the suite's time.
gc.set_threshold(200_000, 20, 100)
