"""When the operations are registered: files that name them load in fresh processes, after imports in either order.

What lives elsewhere: what else importing does and does not do (``test_backend.py``).
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from conftest import missing, require_compiler, run_python
from eager import Fused
from fusionsum.nn import LowRankFusion

ORDERS = {"torch first": "import torch, fusionsum", "torch last": "import fusionsum, torch"}
in_either_order = pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
REGISTERED = "print(hasattr(torch.ops.fusionsum, 'fusion_sum'))"
WARNED = "import warnings; caught = warnings.catch_warnings(record=True).__enter__(); warnings.simplefilter('always')\n"

# torch's own, on its first use of inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance:FutureWarning")

if not any(point.name == "fusionsum" for point in importlib.metadata.entry_points(group="torch.backends")):
    missing("the entry points of an installed fusionsum")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Save inputs and eager outputs of a function and a layer, each exported, and one of them compiled to a package."""
    require_compiler()
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    models = {"function": (Fused(), (torch.randn(3, 4),))}
    models["layer"] = LowRankFusion((4, 5), 6, 3), (torch.randn(3, 4), torch.randn(3, 5))
    for name, (model, inputs) in models.items():
        exported = torch.export.export(model.eval(), inputs)
        torch.export.save(exported, folder / f"{name}.pt2")
        torch.save((inputs, model(*inputs).detach()), folder / f"{name}.pt")
        if name == "function":
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("CI", "true")  # where Inductor refuses an operation that has a decomposition
                torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / f"{name}.aoti.pt2"))
    return folder


@in_either_order
def test_files_load_in_a_fresh_process(imports, files):
    code = """
import torch._inductor.codecache  # which torch 2.10 takes for imported
for path in sorted(folder.glob("*.pt2")):
    inputs, wanted = torch.load(folder / (path.name.split(".")[0] + ".pt"))
    if path.name.endswith(".aoti.pt2"):
        model = torch._inductor.aoti_load_package(str(path))
    else:
        model = torch.export.load(path).module()
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), wanted)
    print(path.name)
"""
    said = run_python(f"{imports}, pathlib; folder = pathlib.Path({str(files)!r})\n" + code)
    assert said.split() == ["function.aoti.pt2", "function.pt2", "layer.pt2"]


@in_either_order
def test_layers_alone_register_too(imports):
    imports = imports.replace("fusionsum", "fusionsum.nn")
    assert run_python(f"{imports}\n{REGISTERED}").strip() == "True"


def test_torch_alone_leaves_fusionsum_alone():
    said = run_python("import sys, torch; print('fusionsum' in sys.modules, 'fusionsum_autoload' in sys.modules)")
    assert said.split() == ["False", "True"]


def test_without_torch_s_autoload_the_first_tensor_registers():
    code = f"import fusionsum, torch\n{REGISTERED}\nfusionsum.fusion_sum(None, torch.ones(2))\n{REGISTERED}"
    assert run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split() == ["False", "True"]


@in_either_order
def test_an_error_of_ours_breaks_neither_import(imports):
    code = f"""
import sys
sys.modules["fusionsum.tensors"] = None
{imports}
import numpy
assert torch.ones(2).sum() == 2 and fusionsum.fusion_sum(None, numpy.ones(2)) == 2
print(*[f"{{w.category.__name__}}: {{w.message}}" for w in caught if "fusionsum" in str(w.message)])
"""
    said = run_python(WARNED + code)
    assert said.startswith("RuntimeWarning: fusionsum could not register its operations with torch: ")
    assert said.count("RuntimeWarning") == 1


@in_either_order
def test_a_torch_too_old_is_named_once_it_is_used(imports):
    code = f"""
import fusionsum.backend
check = fusionsum.backend.adopt_torch
def of_an_older_torch(torch):
    check(type("torch", (), {{"Tensor": object, "__version__": "2.9.1"}}))
fusionsum.backend.adopt_torch = of_an_older_torch
{imports}
try:
    fusionsum.fusion_sum(None, torch.ones(2))
except ImportError as error:
    print(error)
"""
    if imports.startswith("import torch"):
        code = "import sys; sys.modules['torch'] = None\nimport fusionsum.backend; del sys.modules['torch']\n" + code
    said = run_python(WARNED + code)
    assert said.strip() == "fusionsum takes tensors of torch 2.10 or newer, found torch 2.9.1"


@pytest.mark.parametrize("module", ["tensors", "autograd", "nn", "distributed", "losses"])
def test_torch_may_be_imported_by_a_module_of_the_package(module):
    """Then torch's import imports the package again, in the middle of that module's."""
    assert run_python(f"import fusionsum.{module}, torch\n{REGISTERED}").strip() == "True"
