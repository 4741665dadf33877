"""The kernel library's door: arguments that cannot be are refused, structures are the header's, targets are forced."""

from __future__ import annotations

import ast
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from longshort import native, native_layers, structures
from longshort.errors import NativeWarning, UsageError
from longshort.native_layers import Gains, Options, Output, Peepholes, Sequences, Weights
from longshort.structures import BackwardArgs, ForwardArgs, LayerOptionsStructure, LayerWeightsStructure, Shape
from native_reference import CELLS, TARGETS, Array, Case

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
needs_library = pytest.mark.skipif(native.library() is None, reason=native.reason())

# ------------------------------------------------------------------------------------------------- refused arguments


def arguments_of(case: Case, output: Output) -> tuple[ForwardArgs, BackwardArgs, dict[str, Array]]:
    """Return a forward and a backward call that are right, and the arrays that they point to."""
    T, B, I, H = case.T, case.B, case.I, case.H
    G = native.GATES[case.cell] * H
    assert output.saved is not None
    arrays = {"y": output.y, "saved": output.saved, "x": case.x}
    arrays |= {"dy": np.ones_like(output.y), "dx": np.zeros_like(case.x)}
    arrays |= dict(zip(native_layers.Weights._fields, case.filled_weights(), strict=False))
    arrays |= {name: np.zeros((B, H), np.float32) for name in ("h0", "c0", "h_n", "c_n", "dh0", "dc0", "dh_n", "dc_n")}
    arrays |= {"dweight_ih": np.zeros((G, I), np.float32), "dweight_hh": np.zeros((G, H), np.float32)}
    arrays |= {name: np.zeros(G, np.float32) for name in ("dbias_ih", "dbias_hh")}
    forward, backward = ForwardArgs(), BackwardArgs()
    for args in (forward, backward):
        args.shape = Shape(T, B, I, H, 0, None, None, None, native.LAYER_CELLS[case.cell], 0, 1, -1)
        for name, kind, *_ in args._fields_:
            if name in arrays and kind is ctypes.c_void_p:
                setattr(args, name, arrays[name].ctypes.data)
            elif name.endswith(("_step", "_row")):
                width = arrays[name.split("_")[0]].shape[-1]
                setattr(args, name, B * width if name.endswith("_step") else width)
    return forward, backward, arrays


@needs_library
@EVERY_CELL
def test_arguments_that_cannot_be_are_refused(cell: str) -> None:
    library = native.library()
    assert library is not None
    case = Case(np.random.default_rng(0), cell, T=3, B=2, I=4, H=5)
    output = case.forward(save=True)
    indices = {
        "counts": ([1, 2, 2], [3, 2, 1], [2, 1, -1]),  # rising, above B, negative
        "order": ([0, 2], [-1, 0]),
    }
    held = {name: [np.array(v, np.int64) for v in lists] for name, lists in indices.items()}
    largest = 2**31 - 1
    bad: list[dict[str, Any]] = [
        *({name: value} for name in "TBI" for value in (-1, largest + 1, -(2**63))),
        *({"H": value} for value in (0, -1, largest + 1)),
        *({"P": value} for value in (-1, largest + 1, *((3,) if native.STATES[cell] == 1 else ()))),
        *({"cell": value} for value in (-1, 5)),
        *({"target": value} for value in (-2, library.ls_num_targets(), 1000)),
        *({name: array.ctypes.data} for name, arrays in held.items() for array in arrays),
        *({name: None} for name in ("x", "weight_ih", "weight_hh", "y")),
        {"T": largest, "B": largest},
        dict.fromkeys("TBIH", largest),
    ]
    for changes in bad:
        forward, backward, _arrays = arguments_of(case, output)
        for args in (forward, backward):
            for name, value in changes.items():
                setattr(args if hasattr(args, name) else args.shape, name, value)
        assert library.ls_forward(ctypes.byref(forward), 1) == native.BAD_ARGUMENT, changes
        assert library.ls_backward(ctypes.byref(backward), 1) == native.BAD_ARGUMENT, changes
    vector = output.h_n.ctypes.data
    names = ("weight_ci", "weight_cf", "weight_co")
    every = names[1:] if cell == native.COUPLED else names if native.STATES[cell] == 2 else ()
    for given in itertools.chain(*(itertools.combinations(names, n) for n in (1, 2, 3))):
        forward, backward, _arrays = arguments_of(case, output)
        for name in given:
            setattr(forward.options, name, vector)
        wanted = native.OK if given == every else native.BAD_ARGUMENT
        assert library.ls_forward(ctypes.byref(forward), 1) == wanted, given
    forward, backward, _arrays = arguments_of(case, output)
    if native.STATES[cell] == 2:  # a projection without its weights
        forward.shape.P = backward.shape.P = 5
        assert library.ls_forward(ctypes.byref(forward), 1) == native.BAD_ARGUMENT
        assert library.ls_backward(ctypes.byref(backward), 1) == native.BAD_ARGUMENT
    forward, backward, _arrays = arguments_of(case, output)
    saved, backward.saved = backward.saved, None
    assert library.ls_backward(ctypes.byref(backward), 1) == native.BAD_ARGUMENT
    backward.saved = saved
    shape, gates = ctypes.byref(forward.shape), np.empty((5, 3, 2, 5), np.float32).ctypes.data
    for pointers in ((None, gates), (saved, None)):
        assert library.ls_gates(shape, 0, *pointers) == (native.BAD_ARGUMENT if native.SHOWN[cell] else native.OK)
    assert library.ls_gates(None, 0, saved, gates) == native.BAD_ARGUMENT
    assert library.ls_gates(shape, 0, saved, gates) == native.OK
    assert library.ls_forward(ctypes.byref(forward), 1) == native.OK
    assert library.ls_backward(ctypes.byref(backward), 1) == native.OK
    assert library.ls_forward(None, 1) == library.ls_backward(None, 1) == native.BAD_ARGUMENT
    nobody = np.zeros(3, np.int64)  # no row has a step, but all of y is beyond their ends
    forward.shape.counts, forward.y, y = nobody.ctypes.data, None, forward.y
    assert library.ls_forward(ctypes.byref(forward), 1) == native.BAD_ARGUMENT
    forward.shape.starts = nobody.ctypes.data  # of packed rows there is none
    assert library.ls_forward(ctypes.byref(forward), 1) == native.OK
    forward.shape.starts, forward.y = None, y
    assert library.ls_forward(ctypes.byref(forward), 1) == native.OK


@needs_library
def test_sizes_and_names_that_cannot_be_are_refused() -> None:
    library = native.library()
    assert library is not None
    good = Shape(3, 2, 4, 5, 0, None, None, None, 3, 0, 1, -1)
    assert library.ls_saved_floats(ctypes.byref(good), 0) > 0
    assert library.ls_saved_floats(ctypes.byref(good), 1) > library.ls_saved_floats(ctypes.byref(good), 0)
    for name, value in (("T", -1), ("H", 0), ("cell", 9), ("target", 99)):
        shape = Shape(3, 2, 4, 5, 0, None, None, None, 3, 0, 1, -1)
        setattr(shape, name, value)
        assert library.ls_saved_floats(ctypes.byref(shape), 0) == -1
    assert library.ls_saved_floats(None, 0) == -1
    assert library.ls_packed_floats(3, 4, 5, 2, -1) > library.ls_packed_floats(3, 4, 2, 0, -1) > 0
    widths = ((3, -1, 5, 0, -1), (3, 4, 0, 0, -1), (3, 4, 2**40, 0, -1), (3, 4, 5, -1, -1), (2, 4, 5, 3, -1))
    room = np.zeros(1000, np.float32)
    place = room.ctypes.data
    for bad in ((5, 4, 5, 0, -1), *widths, (3, 4, 5, 0, 99)):
        assert library.ls_packed_floats(*bad) == -1
        code, I, H, P, target = bad
        weights = LayerWeightsStructure(I, H, P, code, 0, *[place] * 5)
        assert library.ls_pack(ctypes.byref(weights), target, place) == native.BAD_ARGUMENT
        assert library.ls_sample(ctypes.byref(weights)) == 0 or target == 99
    fitting: dict[str, Any] = {
        "I": 4,
        "H": 5,
        "P": 2,
        "cell": 3,
        "weight_ih": place,
        "weight_hh": place,
        "weight_hr": place,
    }
    assert library.ls_sample(ctypes.byref(LayerWeightsStructure(**fitting))) > 0
    for name in ("weight_ih", "weight_hh", "weight_hr"):
        weights = LayerWeightsStructure(**{**fitting, name: None})
        assert library.ls_pack(ctypes.byref(weights), -1, place) == native.BAD_ARGUMENT
        assert library.ls_sample(ctypes.byref(weights)) == 0
    assert library.ls_pack(ctypes.byref(LayerWeightsStructure(**fitting)), -1, None) == native.BAD_ARGUMENT
    assert library.ls_pack(None, -1, place) == native.BAD_ARGUMENT
    assert library.ls_sample(None) == 0
    assert library.ls_apply(5, -1, 0, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, 99, 0, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, -1, -1, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, -1, 0, None, None) == native.OK
    for target in (-1, library.ls_num_targets()):
        assert library.ls_set_target(target) == native.BAD_ARGUMENT
        assert not library.ls_target_supported(target)
        assert library.ls_target_name(target) is None
    library.ls_trim()


@needs_library
def test_a_line_goes_from_core_to_core() -> None:
    """Or it says so where no second thread comes, or two share a core and each waits for the system to run it."""
    program = (
        "import os\n"
        "from longshort import native\n"
        "print([native.handover() for _ in range(5)])\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(native.handover())\n"
    )
    several, alone = map(ast.literal_eval, python(program).stdout.splitlines())
    assert all(seconds is None or seconds > 0 for seconds in [*several, alone])


@needs_library
def test_arrays_that_do_not_fit_are_refused() -> None:
    case = Case(np.random.default_rng(0), "lstm", T=3, B=2, I=4, H=5)
    run = native_layers.forward
    x, weights, state = case.x, case.weights, case.state
    out = np.zeros((3, 2, 5), np.float32)
    read_only = out.copy()
    read_only.flags.writeable = False
    gain, of_gru = np.ones(15, np.float32), Weights(weights.weight_ih[:15], weights.weight_hh[:15])
    short = Options(gains=Gains(np.ones(20, np.float32), np.ones(20, np.float32)))
    long = Options(gains=Gains(gain, gain, gain[:5], gain[:5]))
    looks, wide = Peepholes(None, gain[:5], gain[:5]), Peepholes(None, gain, gain[:5])
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), (3, 2, 5), (4, 4, 4))
    turned_out = np.zeros((3, 5, 2), np.float32).swapaxes(1, 2)
    ones: Any = np.ones(3)
    zeros: Any = np.zeros((3, 2))
    listed: Any = [[1.0]]
    double: Any = x.astype(np.float64)
    bad: list[tuple[str, Callable[[], object]]] = [
        ("cell must be one of", lambda: run("lsmt", x, weights)),
        ("x must be a float32 array, not float64", lambda: run("lstm", double, weights)),
        ("x must be a float32 array, not list", lambda: run("lstm", listed, weights)),
        (r"x must have the shape \(any, any, 4\), not \(3, 2, 5\)", lambda: run("lstm", out, weights)),
        ("weight_hh must have the shape", lambda: run("gru", x, weights)),
        ("bias_ih must have the shape", lambda: run("lstm", x, weights._replace(bias_ih=np.zeros(3, np.float32)))),
        ("state must hold 2 arrays", lambda: run("lstm", x, weights, state[:1])),
        (r"state\[1\] must have the shape \(2, 5\)", lambda: run("lstm", x, weights, (state[0], out[0, :1]))),
        ("threads must be at least 1", lambda: run("lstm", x, weights, threads=0)),
        ("must be writable", lambda: run("lstm", x, weights, out=read_only)),
        ("must not overlap itself", lambda: run("lstm", x, weights, out=overlapping)),
        ("contiguous in its last axis", lambda: run("lstm", x, weights, out=turned_out)),
        ("packed must have the shape", lambda: run("lstm", x, weights, packed=np.zeros(3, np.float32))),
        ("counts must fall", lambda: run("lstm", x, weights, sequences=Sequences(counts=np.array([1, 2, 2])))),
        ("counts must be a list of integers", lambda: run("lstm", x, weights, sequences=Sequences(counts=ones))),
        ("counts must have the shape", lambda: run("lstm", x, weights, sequences=Sequences(counts=np.array([2])))),
        ("order must be a permutation", lambda: run("lstm", x, weights, sequences=Sequences(order=np.array([0, 0])))),
        ("zoneout must be from 0 to 1", lambda: run("lstm", x, weights, options=Options(zoneout=2.0))),
        ("resets must be a bool array", lambda: run("lstm", x, weights, options=Options(resets=zeros))),
        ("layer normalisation of an LSTM needs gamma_c", lambda: run("lstm", x, weights, options=short)),
        ("gamma_c and beta_c are the LSTM's", lambda: run("gru", x, of_gru, options=long)),
        ("gamma_hh must have the shape", lambda: run("gru", x, of_gru, options=Options(gains=Gains(gain, gain[1:])))),
        ("weight_hr is the LSTM's", lambda: run("gru", x, of_gru._replace(weight_hr=np.ones((5, 5), np.float32)))),
        (
            "weight_hr must have the shape",
            lambda: run("lstm", x, weights._replace(weight_hr=np.ones((5, 4), np.float32))),
        ),
        ("peepholes are the LSTM's, not the gru's", lambda: run("gru", x, of_gru, options=Options(peepholes=looks))),
        ("weight_ci is of the gate i", lambda: run("lstm", x, weights, options=Options(peepholes=looks))),
        ("weight_cf must have the shape", lambda: run("lstm_coupled", x, of_gru, options=Options(peepholes=wide))),
        ("h_mask must have the shape", lambda: run("lstm", x, weights, options=Options(h_mask=out[0, :1]))),
        ("function must be one of", lambda: native_layers.apply("cosh", x)),
        ("save=True", lambda: native_layers.backward("lstm", x, weights, run("lstm", x, weights), None)),
    ]
    starts = Sequences(counts=np.array([2, 2]), starts=np.array([0, 2]))
    bad.append(("must lie inside of the 3 rows", lambda: run("lstm", x[:, 0], weights, sequences=starts)))
    for words, call in bad:
        with pytest.raises(ValueError, match=words):
            call()
    # Arrays that lie in memory in ways that the library does not read are copied.
    turned = np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert np.array_equal(run("lstm", turned, weights).y, run("lstm", x, weights).y)
    assert np.array_equal(run("lstm", x[::-1], weights).y, run("lstm", x[::-1].copy(), weights).y)


# ------------------------------------------------------------------------------------------------- the door


@needs_library
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    declared = {
        "ls_shape": Shape,
        "ls_options": LayerOptionsStructure,
        "ls_weights": LayerWeightsStructure,
        "ls_forward_args": ForwardArgs,
        "ls_backward_args": BackwardArgs,
        "ls_model": structures.ModelStructure,
        "ls_sampling": structures.SamplingStructure,
        "ls_decode_args": structures.DecodeArgs,
        "ls_read_args": structures.ReadArgs,
        "ls_tree_args": structures.TreeArgs,
        "ls_loss_args": structures.LossArgs,
    }
    lines, wanted = [], []
    for name, structure in declared.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        wanted.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field}));')
            wanted.append(getattr(structure, field).offset)
    lines.append('printf("%d\\n", LS_ABI_VERSION);')
    wanted.append(native.ABI_VERSION)
    source = tmp_path / "sizes.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <longshort.h>\nint main(void) {{\n{body}\n}}\n"
    )
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "sizes")], check=True)
    found = subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in found.split()] == wanted


def codes(structure: Any) -> list[str]:
    """Return the code that `struct` has for each field of a structure."""
    kinds: dict[Any, str] = {ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f", ctypes.c_void_p: "P"}
    return [code for _, kind, *_ in structure._fields_ for code in (kinds[kind] if kind in kinds else codes(kind))]


def test_what_pytorchs_calls_are_packed_by_is_the_structures() -> None:
    calls = pytest.importorskip("longshort.calls", exc_type=ImportError)
    wanted = {"SHAPE": Shape, "WEIGHTS": LayerWeightsStructure, "FORWARD": ForwardArgs, "BACKWARD": BackwardArgs}
    for name, structure in wanted.items():
        packed = getattr(calls, name)
        parts = re.findall(r"(\d*)(\w)", packed.format)
        assert [code for count, code in parts for _ in range(int(count or 1))] == codes(structure), name
        assert packed.size == ctypes.sizeof(structure)


@needs_library
def test_the_library_needs_only_the_system_and_shows_only_its_interface() -> None:
    readelf, nm = shutil.which("readelf"), shutil.which("nm")
    if not (readelf and nm and native.PATH.is_file()):
        pytest.skip("readelf, nm and the package's own library are needed")

    def show(*command: str) -> str:
        return subprocess.run([*command, str(native.PATH)], check=True, capture_output=True, text=True).stdout

    needed = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.*?)\]", show(readelf, "-d"))}
    assert needed <= {"libc", "libm", "libdl", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    symbols = {line.split()[-1] for line in show(nm, "-D", "--defined-only").splitlines()}
    assert symbols == set(native._SIGNATURES)


@needs_library
def test_targets_are_listed_best_first_and_forced() -> None:
    assert set(native.targets()) <= set(native.built_targets()) <= {*TARGETS, *native.LOWER}
    assert [name for name in native.targets() if name != "amx"][-1] == "baseline"
    unasked = ("amx", *native.LOWER)
    assert native.built_targets()[-1] in ("baseline", *unasked)
    assert native.active_target() not in unasked
    assert native.threading() in ("own", "openmp")
    before = native.active_target()
    with pytest.raises(UsageError, match=r"There is no target 'avx521'; there are .*\nDid you mean 'avx512'"):
        native.set_target("avx521")
    assert native.active_target() == before


def test_other_targets_are_other_code() -> None:
    """Fused multiplications round once: what a forced target computes shows which it was."""
    if not {"baseline", "avx2"} <= set(native.targets()):
        pytest.skip("there are not two targets here")
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert not np.array_equal(native_layers.apply("sigmoid", x, "baseline"), native_layers.apply("sigmoid", x, "avx2"))


class OldProcessor:
    """A library whose second target this processor lacks."""

    def ls_num_targets(self) -> int:
        return 2

    def ls_target_name(self, i: int) -> bytes:
        return (b"baseline", b"avx2")[i]

    def ls_target_supported(self, i: int) -> int:
        return int(i == 0)


def test_a_target_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", native._Loaded(OldProcessor(), ""))  # type: ignore[arg-type]
    assert native.targets() == ("baseline",)
    with pytest.raises(UsageError, match="This processor cannot run the target 'avx2'; it can run baseline"):
        native.set_target("avx2")


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@needs_library
def test_the_environment_forces_target_and_library() -> None:
    for name in native.targets():
        done = python("from longshort import native; print(native.active_target())", LONGSHORT_TARGET=name)
        assert done.stdout == f"{name}\n", done.stderr
    doctor = "from longshort.cli import main; import sys; sys.exit(main(['doctor']))"
    done = python(doctor, LONGSHORT_TARGET="avx3")
    assert (done.returncode, "LONGSHORT_TARGET" in done.stderr, "Did you mean" in done.stderr) == (2, True, True)
    done = python(doctor, LONGSHORT_LIBRARY="/nowhere/lib.so")
    assert done.returncode == 2
    assert "LONGSHORT_LIBRARY cannot be used: there is no file /nowhere/lib.so" in done.stderr


def test_it_is_loaded_when_it_is_needed() -> None:
    program = (
        "import sys, longshort; assert 'longshort.native' not in sys.modules\n"
        "from longshort import native; assert native._loaded is None and 'numpy' not in sys.modules"
    )
    assert python(program).returncode == 0


def test_without_a_library_everything_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LONGSHORT_LIBRARY", raising=False)
    for content, why in ((None, "was not built"), ("text", "file too short|invalid ELF header|not a mach-o")):
        path = tmp_path / "a" / "b" / "c" / "liblongshort.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(content)
        monkeypatch.setattr(native, "PATH", path)
        monkeypatch.setattr(native, "_loaded", None)
        monkeypatch.setattr(native, "_warned", False)
        assert native.library() is None
        assert re.search(f"^There are no native kernels: .*({why})", native.reason())
        assert "LONGSHORT_REQUIRE_NATIVE=1 pip install" in native.reason()
        assert native.targets() == native.built_targets() == ()
        assert native.active_target() is native.threading() is None
        with pytest.warns(NativeWarning, match="There are no native kernels"):
            assert not native.ready()
        assert not native.ready()  # says it once
        with pytest.raises(UsageError, match="There are no native kernels"):
            native_layers.apply("exp", np.zeros(1, np.float32))
