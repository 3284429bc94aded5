"""What compiled programs hold, and how many of them a piece of code makes."""

import contextlib

import jax


def count_loops(compiled):
    """Loops that the code asked for; the compiler also makes loops of scatters."""
    lines = compiled.as_text().splitlines()
    return sum(" while(" in line and '/scatter"' not in line for line in lines)


@contextlib.contextmanager
def compiled_programs():
    """A list that receives the name of each program that is compiled, or read from the cache."""
    names = []

    def listen(event, duration, fun_name="?", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
