"""What compiled programs hold."""


def count_loops(compiled):
    """Loops that the code asked for; the compiler also makes loops of scatters."""
    lines = compiled.as_text().splitlines()
    return sum(" while(" in line and '/scatter"' not in line for line in lines)
