"""The shape of the package: imports point down, the public names are the promised ones, pages are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longshort
from conftest import ROOT

PACKAGE = ROOT / "src" / "longshort"
LAYERS: dict[str, int] = {}
TORCH: set[str] = set()
_PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
for layer, torch, names in re.findall(r"^\| (\d)( T)? \| ((?:`[\w/.]+`(?:, )?)+) \|", _PAGE, re.MULTILINE):
    for name in re.findall(r"`([\w/.]+)`", names):
        folder = names.split("`")[1].rpartition("/")[0]  # the first name of a row says where all of them are
        module = f"{folder}/{name.rpartition('/')[2]}".lstrip("/").removesuffix(".py").replace("/", ".")
        LAYERS[module] = int(layer)
        if torch:
            TORCH.add(module)
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


def imports_of(module: str) -> set[str]:
    """Return the modules of the package that `module` imports, anywhere in it."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longshort":
            origin = (node.module or "").removeprefix("longshort").removeprefix(".")
            found |= {origin, *(f"{origin}.{alias.name}".lstrip(".") for alias in node.names)}
    return {name for name in found if name in MODULES}


def test_the_page_names_every_file() -> None:
    assert sorted({*LAYERS, "scratch"}) == MODULES


@pytest.mark.parametrize("module", [m for m in MODULES if m != "scratch"])
def test_imports_point_down(module: str) -> None:
    for imported in imports_of(module) - {"scratch"}:
        assert LAYERS[imported] <= LAYERS[module], f"{module} imports {imported}"


def test_what_needs_no_torch_imports_none() -> None:
    free = [f"longshort.{module}" for module in MODULES if module not in TORCH | {"scratch"}]
    program = f"import sys, {', '.join(free)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_public_names_are_there() -> None:
    declared = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in declared.body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {*longshort.__all__} == {*typed, "load"}
    for name in longshort.__all__:
        assert getattr(longshort, name) is not None
        assert name in dir(longshort)
    with pytest.raises(AttributeError, match="LSMT"):
        longshort.LSMT  # noqa: B018


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    program = (
        "import longshort.training, longshort.evaluation, longshort.generation, longshort;"
        "assert all(callable(f) for f in (longshort.train, longshort.evaluate, longshort.generate, longshort.load))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_workflows_run_pinned_actions() -> None:
    for page in (ROOT / ".github" / "workflows").glob("*.yml"):
        for action in re.findall(r"uses: *(\S+)", page.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), f"{page.name}: {action}"


def test_nothing_of_others_is_shipped() -> None:
    """No text, model or data file; only code, pages, pictures of ours and results."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # JSON files are results, PNG files plots of them.
    allowed = {".py", ".md", ".toml", ".json", ".png", ".svg", ".typed", ".cpp", ".h", ".yml", ".html", ".js", ".css"}
    plain = {"LICENSE", "Makefile", ".gitignore", ".gitattributes", "constraints.txt", "CMakeLists.txt", "run"}
    for line in listed.stdout.splitlines():
        path = Path(line)
        assert path.suffix in allowed or path.name in plain, line
