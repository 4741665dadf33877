"""Installing from source, with a compiler and without one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or importlib.util.find_spec("scikit_build_core") is None,
    reason="CMake and scikit-build-core are needed to build without a network",
)
NO_COMPILER = {"CXX": "/nowhere/c++", "LONGSHORT_REQUIRE_NATIVE": "0"}


def build_wheel(place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of this checkout into `place`."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    settings = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    return subprocess.run(
        [*command, "--wheel-dir", str(place), str(ROOT)], env=settings, capture_output=True, text=True, check=False
    )


def unpack(place: Path) -> tuple[str, Path]:
    """Return the end of the name of the wheel in `place`, and a directory with its content."""
    (wheel,) = place.glob("longshort-*.whl")
    content = place / "content"
    zipfile.ZipFile(wheel).extractall(content)
    assert not [path for path in content.rglob("*") if path.name in ("csrc", "tests", "CMakeLists.txt")]
    return wheel.name.split("-", 2)[2], content


def doctor(content: Path) -> dict[str, object]:
    """Return what `longshort doctor` says of an unpacked wheel."""
    done = run_unpacked(content, "from longshort.cli import main; main(['doctor', '--json'])")
    report: dict[str, object] = json.loads(done)
    return report


def run_unpacked(content: Path, program: str) -> str:
    """Return what `program` prints where an unpacked wheel is the only longshort there is."""
    path = f"import sys; sys.path[:0] = [{str(content)!r}]; sys.path.append({sysconfig.get_path('platlib')!r})\n"
    here = f"import longshort; assert longshort.__file__.startswith({str(content)!r})\n"
    command = [sys.executable, "-S", "-c", path + here + program]  # without the editable installation
    return subprocess.run(command, cwd=content, capture_output=True, text=True, check=True).stdout


def test_without_a_compiler_it_installs_as_pure_python_and_says_so_once(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    tags, content = unpack(tmp_path)
    assert tags == "py3-none-any.whl"
    assert not list(content.rglob("*.so"))
    report = doctor(content)
    assert report["native_kernels"] == []
    assert "There are no native kernels" in str(report["advice"])
    program = """
import warnings
from longshort import native
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not native.ready() and not native.ready()
(one,) = said
assert "There are no native kernels" in str(one.message), one.message
"""
    run_unpacked(content, program)


def test_where_native_kernels_are_required_a_failure_is_one_and_shows_the_reason(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, **NO_COMPILER | {"LONGSHORT_REQUIRE_NATIVE": "1"})
    assert done.returncode != 0
    assert "/nowhere/c++" in done.stderr + done.stdout
    assert not list(tmp_path.glob("*.whl"))


def test_an_error_of_the_compiler_is_no_pure_wheel_either(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    done = build_wheel(tmp_path, CXXFLAGS="-include /nowhere/missing.h", LONGSHORT_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_with_a_compiler_one_wheel_serves_every_python(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    # Unoptimised, and one target of three: it is about the wheel.
    define = "CMAKE_CXX_FLAGS_RELEASE=-O1;LONGSHORT_TARGETS="
    done = build_wheel(tmp_path, LONGSHORT_REQUIRE_NATIVE="1", SKBUILD_CMAKE_DEFINE=define)
    assert done.returncode == 0, done.stderr
    tags, content = unpack(tmp_path)
    assert tags.startswith("py3-none-")
    assert tags != "py3-none-any.whl"
    assert [path.parent.name for path in content.rglob("liblongshort.so")] == ["_lib"]
    report = doctor(content)
    assert "baseline" in str(report["native_kernels"])
    assert report["native_target"]
