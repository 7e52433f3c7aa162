"""Run the tests with other versions of PyTorch and transformers, and keep the results as a table in docs/versions.md.

    python benchmarks/conformance/versions.py                         the pairs of PAIRS, the whole suite
    python benchmarks/conformance/versions.py --torch 2.14.1 --transformers 5.24 -- tests/test_backend.py -k explain
    python benchmarks/conformance/versions.py --env folder --torch 2.14.1     an environment that is there already

Each pair gets a virtual environment of its own in a temporary folder, so this takes a download of PyTorch for each and
as long as the suite; its Python must be on PATH. With --env nothing is installed. What follows -- goes to pytest. A
later run of the same versions and tests replaces the row.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "versions.md"
# (python, torch, transformers, torchao): the oldest of everything, a pair between, and the newest of everything
PAIRS = (
    ("3.10", "2.11.*", "5.17.*", "0.15.*"),
    ("3.11", "2.13.*", "5.23.*", "0.18.*"),
    ("3.13", "2.15.*", "5.24.*", "0.18.*"),
)
COLUMNS = ("Python", "torch", "transformers", "torchao", "tests", "result")
HEAD = """# Versions that the tests ran with

For whoever asks whether their versions will do. Written by `python benchmarks/conformance/versions.py`, which runs the
suite in an environment of given versions. "all" is the whole suite; any other entry names the tests. A version that is
not here, or newer, is not refused: the backend warns once.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--torch", help="a version, e.g. 2.14.1 or 2.14.*; without it, all pairs")
    parser.add_argument("--transformers", default="5.24.*")
    parser.add_argument("--torchao", default="0.18.*")
    parser.add_argument("--processes", type=int, default=2, help="that the suite runs in")
    parser.add_argument("--env", type=Path, help="a virtual environment with these versions in it")
    own, tests = sys.argv[1:], []
    if "--" in own:
        own, tests = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    pairs = [(args.python, args.torch, args.transformers, args.torchao)] if args.torch or args.env else PAIRS
    for python, *_ in [] if args.env else pairs:
        interpreter(python)  # a missing one is reported before hours of tests
    failed = 0
    for pair in pairs:
        with tempfile.TemporaryDirectory() as folder:
            env = args.env or made(Path(folder) / "venv", *pair)
            row, code = ran(env / "bin" / "python", tests, args.processes)
            keep(row)
            print(" | ".join(row))
            failed |= code
    return failed


def interpreter(python: str) -> str:
    """The path of python<version>. Exits with what to do where it is missing."""
    found = shutil.which(f"python{python}")
    if found is None:
        sys.exit(
            f"versions: python{python} is not on PATH. Install it (your system's packages, pyenv, or `uv python "
            f"install {python}`), choose another with --python and --torch, or name an environment with --env."
        )
    return found


def made(folder: Path, python: str, torch: str, transformers: str, torchao: str) -> Path:
    """A virtual environment with these versions and the package's test extra."""
    subprocess.run([interpreter(python), "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    exact = lambda name, version: f"{name}=={version}"
    subprocess.run([*pip, exact("torch", torch)], check=True)
    wanted = [exact("transformers", transformers), exact("torchao", torchao)]
    subprocess.run([*pip, "-e", f"{ROOT}[test]", *wanted], check=True, cwd=ROOT)
    return folder


def ran(python: Path, tests: list[str], processes: int) -> tuple[tuple[str, ...], int]:
    """(the table's row, pytest's status) of the tests in one environment."""
    asked = (
        "import sys, importlib.metadata as m; print(sys.version.split()[0]); "
        "[print(m.version(n)) for n in ('torch', 'transformers', 'torchao')]"
    )
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    # one thread a process, as in .ci/run; the checkout is what is imported, whether or not the environment holds one
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "--show-capture=no",
        *(tests or ["-n", str(processes), "--dist", "worksteal"]),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    lines = done.stdout.strip().splitlines()
    result = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")) if lines else f"pytest ended with {done.returncode}"
    failures = [line.split(" - ")[0].split()[-1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    outcome = result + (f": {', '.join(failures)}" if failures else "")
    return (*found, " ".join(tests) or "all", outcome), done.returncode


def keep(row: tuple[str, ...]) -> None:
    """Put the row into the table, in place of one of the same versions and tests."""
    rows = []
    if TABLE.exists():
        cells = [
            tuple(cell.strip() for cell in line.strip("| \n").split(" | ")) for line in TABLE.read_text().splitlines()
        ]
        rows = [cell for cell in cells if len(cell) == len(COLUMNS) and cell != COLUMNS and not cell[0].startswith("-")]
    rows = sorted([other for other in rows if other[:-1] != row[:-1]] + [row])
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    TABLE.write_text(HEAD + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
