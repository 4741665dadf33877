"""The kernel library once more, built with sanitizers: its tests under ASan and UBSan, its thread pool under TSan.

`make test` runs part of it; `make sanitize` everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

EVERYTHING = os.environ.get("LONGSHORT_SANITIZE") == "all"
CXX = os.environ.get("CXX", "c++")


def build(sanitizers: str, *settings: str) -> Path:
    """Return the directory of a build with these sanitizers, kept between runs; skip where there can be none."""
    if sys.platform != "linux" or shutil.which(CXX) is None or shutil.which("cmake") is None:
        pytest.skip("sanitizers need Linux, a C++ compiler and CMake")
    flags = [f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run([CXX, *flags], input="int main() {}", capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this compiler cannot build with -fsanitize={sanitizers}")
    place = ROOT / "build" / f"sanitize-{sanitizers.split(',')[0]}"
    common = [f"-DLONGSHORT_SANITIZE={sanitizers}", "-DLONGSHORT_TESTS=ON", "-DLONGSHORT_WERROR=ON"]
    run(["cmake", "-S", str(ROOT), "-B", str(place), *common, *settings])
    run(["cmake", "--build", str(place), "--parallel", "2"])
    return place


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"


def runtime(name: str) -> str:
    """Return the path of a sanitizer's library, which must be in the process before Python is."""
    command = [CXX, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"this compiler has no {name}")
    return found


def test_memory_and_undefined_behaviour() -> None:
    targets = "avx2;avx512;amx;avx512_bf16;amx_bf16;amx_bf16x3" if EVERYTHING else "avx512"
    place = build("address,undefined", f"-DLONGSHORT_TARGETS={targets}")
    few = "((sizes or lengths or normalisation or threads or refused) and not rnn and not share and not coupled)"
    few += " or (projections and reverse) or refuses or pieces or one_hot_rows or gradients_are_exact or does_not_fit"
    few += " or (directions and not rnn and not coupled)"
    few = f"({few}) and not baseline"
    tests = ["-k", "not environment" if EVERYTHING else few, "tests/test_native.py", "tests/test_native_door.py"]
    tests += [
        "tests/test_directions.py",
        "tests/test_decoding.py",
        "tests/test_prefixes.py",
        "tests/test_tokens.py",
        *(["tests/test_bfloat16.py"] if EVERYTHING else []),
    ]
    run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        LD_PRELOAD=runtime("libasan.so"),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        LONGSHORT_LIBRARY=str(place / "liblongshort.so"),
    )
    run([str(place / "pool_test"), "5"], ASAN_OPTIONS="detect_leaks=1")


def test_threads() -> None:
    # The pool is the same for every target.
    run(
        [str(build("thread", "-DLONGSHORT_TARGETS=") / "pool_test"), "200" if EVERYTHING else "5"],
        TSAN_OPTIONS="halt_on_error=1",
    )
