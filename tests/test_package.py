"""The package: sdist and pure-Python wheel, imports among its modules, examples of docstrings, symbols of the kernels.

What lives elsewhere: imports without torch or without the native module (``test_backend.py``).
"""

from __future__ import annotations

import ast
import doctest
import email
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import fusionsum as fs
from conftest import PACKAGE, TESTS, missing, require_compiler, run_python, source

ROOT = TESTS.parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name, path in FILES.items() if path.stem != "__main__"]
WEAK = {"W", "V", "u"}  # nm's letters for defined symbols of which the linker keeps any one


def build(kind: str, source, into, **environment: str):
    """Call the build backend, as pip does, and return the one file it makes."""
    code = f"import scikit_build_core.build as b; print(b.build_{kind}({str(into)!r}))"
    said = run_python(f"import os; os.chdir({str(source)!r})\n" + code, timeout=300, **environment)
    return into / said.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", source("pyproject.toml").parent, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    """Build from the sdist where there is no compiler: PATH leads to CMake and Ninja only, CXX nowhere."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        if found := shutil.which(tool, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])):
            (tools / tool).symlink_to(found)
    source = next(path for path in folder.iterdir() if (path / "pyproject.toml").exists())
    return build("wheel", source, folder, PATH=str(tools), CXX="/nonexistent/c++", CC="/nonexistent/cc", CXXFLAGS="")


def test_sdist_has_what_a_build_needs_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    suffixes = {".py", ".h", ".inl", ".cpp", ".map", ".cu", ".cuh", ".options"}
    sources = [p for top in ("csrc", "python") for p in (ROOT / top).rglob("*") if p.suffix in suffixes]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith((".git/", "build/"))]


def test_wheel_without_a_compiler(pure_wheel, tmp_path):
    """It installs, works, says on import that it has no kernels, and refuses to be imported where kernels are required."""
    assert pure_wheel.name == f"fusionsum-{fs.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".h", ".cpp"))]
        assert {"fusionsum/py.typed", "fusionsum_autoload/__init__.py"} <= set(archive.namelist())
        points = archive.read(f"fusionsum-{fs.__version__}.dist-info/entry_points.txt").decode()
        assert "[torch.backends]\nfusionsum = fusionsum_autoload:register" in points
        metadata = email.message_from_bytes(archive.read(f"fusionsum-{fs.__version__}.dist-info/METADATA"))
        archive.extractall(tmp_path)
    assert metadata["Name"] == "fusionsum"
    assert metadata["License-Expression"] == "MIT"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.split(">")[0] for line in required] == ["numpy"]
    assert set(metadata.get_all("Provides-Extra")) >= {"torch", "pipeline", "test", "dev"}

    clean = {"PYTHONPATH": str(tmp_path), "FUSIONSUM_BACKEND": "", "FUSIONSUM_REQUIRE_NATIVE": ""}
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusionsum as fs
import numpy as np
assert fs.__file__.startswith({place!r}), fs.__file__
assert fs.fusion_sum(None, np.ones((3, 5))).tolist() == [5.0] * 3
print(caught[0].message)
"""
    said = run_python(code.format(place=str(tmp_path)), **clean)
    assert "correct but slow" in said
    assert "C++17 compiler" in said
    refused = "try:\n    import fusionsum\nexcept ImportError as error:\n    print(error)"
    assert "FUSIONSUM_REQUIRE_NATIVE" in run_python(refused, **clean | {"FUSIONSUM_REQUIRE_NATIVE": "1"})


def imported_by(name: str, path: pathlib.Path) -> set[str]:
    """List the modules of this package that a file imports, wherever in the file, also for its annotations only."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else source for module in inner}
    return found & set(FILES)


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Find circles: each is reported where it was first closed."""
    found, done = [], set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for other in sorted(imports[name]):
                follow(other, (*path, name))
            done.add(name)

    for name in sorted(imports):
        follow(name, ())
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"d"}}) == ["a -> b -> c -> a", "d -> d"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_in_a_circle():
    imports = {name: imported_by(name, path) for name, path in FILES.items()}
    assert "fusionsum.autograd" in imports["fusionsum.api"]  # inside a function
    assert "fusionsum.call" in imports["fusionsum.autograd.vmap"]  # from the package around
    assert circles(imports) == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing(f"{error.name}, which {name} imports")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", fs.__all__)
def test_public_functions_are_documented_with_an_example(name):
    doc = getattr(fs, name).__doc__
    assert "Returns\n" in doc or "Raises\n" in doc or name == "get_num_threads"
    assert ">>> " in doc


def test_no_weak_symbol_leaves_its_instruction_set():
    """Code compiled for one set must never be what the linker picks for another."""
    objects = sorted((ROOT / "build").rglob("isa_*.cpp.o"))  # as CMake names them; compiled.py's are of test programs
    if not objects or not shutil.which("nm"):
        missing("the object files of a build in the source tree, build/**/isa_*.cpp.o" if not objects else "nm")
    for path in objects:
        isa = path.name.removeprefix("isa_").split(".")[0]
        listed = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            kind, symbol = line.split(maxsplit=2)[1:]
            assert kind not in WEAK or f"fusionsum::{isa}::" in symbol, f"{path.name}: {symbol}"
            assert not kind.isupper() or symbol.startswith(f"fusionsum::{isa}::"), f"{path.name} exports {symbol}"


@pytest.mark.parametrize("machine", ["", "-D__SIZEOF_POINTER__=4", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"])
def test_a_processor_that_the_kernels_are_not_for_is_told_at_once(machine):
    """As an error of the compiler, of which an installation makes a wheel without the native module."""
    require_compiler()
    other = [machine.partition("=")[0].replace("-D", "-U"), machine] if machine else []
    command = ["g++", "-std=c++17", "-fsyntax-only", *other, "-x", "c++", str(ROOT / "csrc" / "sum.h")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    assert bool(machine) == ("error: #error \"fusionsum's native module needs GCC or Clang and a 64-bit" in said), said


def test_the_native_module_shows_its_initialiser_only():
    """What else it showed, templates of the standard library say, other modules of the process could take for theirs."""
    if fs.backend._core is None or not shutil.which("nm") or sys.platform != "linux":
        missing("the native module, or nm")
    command = ["nm", "-D", "--defined-only", fs.backend._core.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["PyInit__core"]


def test_the_stub_of_the_native_module_names_all_of_it():
    stub = PACKAGE / "_core.pyi"
    if fs.api.native is None or not stub.exists():
        missing("the native module or its stub")
    names = [name for name in dir(fs.api.native) if not name.startswith("_")]
    assert [name for name in names if not re.search(rf"^(def {name}\(|{name}: )", stub.read_text(), re.M)] == []
    assert sys.modules["fusionsum._core"] is fs.backend._core
