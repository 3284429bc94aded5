"""All of a release but the upload: build, compare, install and try.

    python .ci/release.py [--folder dist]

Builds sdist and wheel twice and compares their hashes, checks the version against the changelog,
installs the wheel in an empty environment, and runs the README's examples there.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> dict[str, str]:
    """Hashes of sdist and wheel, by file name; the time of the last commit stands in for now."""
    commit = ["git", "log", "-1", "--format=%ct"]
    stamp = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    env = os.environ | {"SOURCE_DATE_EPOCH": stamp or "1577836800"}
    subprocess.run([sys.executable, "-m", "build", "-o", folder, ROOT], env=env, check=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def versions() -> tuple[str, str]:
    """Of the package, and of the changelog's newest section."""
    code = (ROOT / "numpyro_flows/__init__.py").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    return re.search('__version__ = "(.*)"', code)[1], re.search(r"^## (\S+)", changelog, re.M)[1]


def try_out(wheel: Path) -> None:
    """Install a wheel in an empty environment, and run the README's examples outside of here."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
        script = Path(folder, "examples.py")
        script.write_text("\n".join(examples))
        subprocess.run([python, "-I", script], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="where files are left")
    folder = parser.parse_args().folder

    ours, newest = versions()
    if ours != newest:
        sys.exit(f"The package is {ours}, the changelog's newest section {newest}.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hashes = build(folder)
    with tempfile.TemporaryDirectory() as second:
        again = build(Path(second))
    if hashes != again:
        sys.exit(f"Two builds differ: {hashes} and {again}.")
    (wheel,) = folder.glob("*.whl")
    try_out(wheel)
    print(f"numpyro_flows {ours} is ready in {folder}:")
    for name, digest in sorted(hashes.items()):
        print(f"  {digest}  {name}")


if __name__ == "__main__":
    main()
