"""cpp: the C++ kernels of this folder, compiled at first use by the user's compiler ($CXX, else c++, g++, clang++).

That takes a few seconds. Libraries are kept in $XDG_CACHE_HOME/akvq_fx, else ~/.cache/akvq_fx, under a name made of the
sources, the flags and the processor's features.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

COMPILE_SECONDS = 120
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())  # the first that compiles is used


@functools.cache
def function(sources: tuple[str, ...], name: str, pointers: int) -> tuple:
    """(the function, of so many pointers, returning an int; ""), or ((), why there is none). Tried once a process.

    sources    the file to compile, then what it includes
    """
    try:
        path = library_path(sources)
        built = not path.is_file()
        if built:
            compile_to(path, sources[0])
        try:
            found = getattr(ctypes.CDLL(str(path)), name)
        except OSError:
            if built:
                raise
            compile_to(path, sources[0])  # a damaged file
            found = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"no C++ kernel: {error}"
        log.info("%s uses its slower reference: %s", name.replace("_", "::") + " on the CPU", reason)
        return (), reason
    found.argtypes, found.restype = [ctypes.c_void_p] * pointers, ctypes.c_int
    return found, ""


def library_path(sources: tuple[str, ...]) -> Path:
    parts = [(Path(__file__).parent / name).read_bytes() for name in sources]
    parts += [repr(x).encode() for x in (FLAGS, EXTRA_FLAGS, os.environ.get("CXX", ""), platform.machine(), features())]
    name = f"{Path(sources[0]).stem}_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "akvq_fx" / name


def features() -> str:
    """What the processor can do: a library for -march=native must not reach another machine through a shared home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"no C++ compiler: looked for {chosen[0] if chosen else 'c++, g++, clang++'}")


def compile_to(path: Path, source: str) -> None:
    """Compile in a folder of our own and move the result: processes that build at once do not see each other."""
    if sys.platform == "win32" or sys.byteorder != "little":
        raise RuntimeError(f"{sys.platform}, {sys.byteorder}-endian, accepted: little-endian Linux or macOS")
    command = compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = str(Path(folder) / path.name)
        for extra in EXTRA_FLAGS:
            arguments = [*command, *FLAGS, *extra, str(Path(__file__).parent / source), "-o", made]
            result = subprocess.run(arguments, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if result.returncode == 0:
                os.replace(made, path)
                return
            said = said or result.stderr
    raise RuntimeError(f"{command[0]} failed: {said.strip()[:500]}")
