"""What this machine is and which versions run on it: for `doctor`, and beside every measured figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import longshort
from longshort import native
from longshort.errors import UsageError

TESTED_TORCH = (2, 13)
HELD_TO = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "LONGSHORT_TARGET": "avx2",
    }
}
"""Environment variables that keep PyTorch's kernels and ours from using more than a set of vector instructions."""


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells what a container may take."""


def memory() -> int:
    """Return the bytes of memory that this process may take, the machine's or its container's; 0 if nothing tells."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):  # not on this system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with suppress(OSError, ValueError):  # no such file, or the word `max` in it
            limits.append(int((CGROUP / name).read_text(encoding="ascii")))
    return min((limit for limit in limits if limit > 0), default=0)


def vector_extensions() -> list[str]:
    """Return the vector instructions that matter for matrix products, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile")
    return [flag for flag in wanted if flag in flags]


def hold_to(isa: str) -> None:
    """Keep this process to the vector instructions `isa`, a key of `HELD_TO`; before PyTorch is loaded.

    Raises:
        UsageError: PyTorch is loaded already, so that it would not listen any more.
    """
    variables = HELD_TO[isa]
    if "torch" in sys.modules and any(os.environ.get(name) != value for name, value in variables.items()):
        raise UsageError(
            f"PyTorch is loaded already, and cannot be held to {isa} any more.",
            f"Set {' '.join(f'{name}={value}' for name, value in variables.items())} before Python starts.",
        )
    os.environ.update(variables)


def version_of(package: str) -> str | None:
    """Return the installed version of `package`, or None; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def description() -> dict[str, object]:
    """Return machine and versions as JSON can hold them."""
    packages = ("torch", "numpy", "safetensors")
    return {
        "processor": processor(),
        "cores": cores(),
        "vector_extensions": vector_extensions(),
        "native_kernels": list(native.targets()),
        "bfloat16_kernels": [name for name in native.supported() if name in native.LOWER],
        "native_target": native.active_target(),
        "native_threads": native.threading(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "longshort": longshort.__version__,
        **{package: version_of(package) for package in packages},
    }


def advice() -> list[str]:
    """Return a line for each thing that is missing or untested here, with what to do about it."""
    lines = native.reason().splitlines()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        lines.append(f"Python {platform.python_version()} is untested; 3.11 to 3.13 are tested.")
    torch = version_of("torch")
    if torch is None:
        lines.append("PyTorch is missing: models run, but cannot be trained. pip install 'longshort[train]'")
        lines.append(
            "On Linux take PyTorch's CPU build first; the README says how. The default one holds gigabytes of CUDA."
        )
    elif tuple(int(part) for part in torch.split(".")[:2] if part.isdigit()) != TESTED_TORCH:
        lines.append(f"torch {torch} is untested; 2.10 to 2.13 are meant to work, 2.13 is tested.")
    for package, extra, purpose in (
        ("pooch", "train", "download named corpora"),
        ("matplotlib", "plot", "draw plots"),
        ("onnx", "export", "write ONNX files"),
        ("fastapi", "serve", "answer over HTTP"),
    ):
        if version_of(package) is None:
            lines.append(f"{package} is missing, which is needed to {purpose}: pip install 'longshort[{extra}]'")
    return lines
