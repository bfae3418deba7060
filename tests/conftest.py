"""What the test files share: the list of forms, random cases, the float64 oracle and its bounds, fresh interpreters.

What lives elsewhere: the tests, one file per source file. The oracle is ``reference.py`` on inputs widened to float64;
``test_reference.py`` holds it to an independent loop in arbitrary precision.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # a missing native module is the business of test_backend.py
    import fusionsum as fs
    from fusionsum import api, backend, call, reference

import device

device.enter()

TESTS = pathlib.Path(__file__).parent
PACKAGE = pathlib.Path(fs.__file__).parent
DTYPES = call.DTYPES
NARROW = tuple(name for name in DTYPES if np.dtype(name).itemsize == 2)
MIXED = tuple(("float32", name) for name in NARROW)  # weights, factors: the mixtures that have kernels of their own
ACTIVATIONS = tuple(reference.ACTIVATIONS)


@dataclass(frozen=True)
class Form:
    """Shapes spelt by one letter per axis ("B1n"), the axis summed, and no sizes yet."""

    weights: str | None
    factors: tuple[str, ...]
    dim: int = -1

    def shapes(self, **sizes: int) -> tuple[tuple[int, ...] | None, list[tuple[int, ...]]]:
        """Shapes of the weights (or None) and of the factors."""
        sizes = {"1": 1, "A": 2, "B": 3, "C": 4, "K": 2, "O": 3, "n": 5} | sizes
        weights = None if self.weights is None else tuple(sizes[axis] for axis in self.weights)
        return weights, [tuple(sizes[axis] for axis in factor) for factor in self.factors]

    def case(self, rng: Any, dtype: str = "float64", weights_dtype: str | None = None, **options: Any) -> Case:
        """Random operands; `options` are sizes by letter, `kind` for `random`, and the fields of Case."""
        fields = {k: v for k, v in options.items() if k in ("activations", "present", "absent")}
        kind = options.get("kind", "normal")
        weights, factors = self.shapes(**{k: v for k, v in options.items() if len(k) == 1})
        return Case(
            None if weights is None else random(rng, weights, weights_dtype or dtype, kind),
            [random(rng, shape, dtype, kind) for shape in factors],
            dim=self.dim,
            **fields,
        )


FORMS = {
    "paired": Form("n", ("Bn", "Bn")),
    "vector output": Form("n1", ("BnO", "BnO"), dim=1),
    "mixing": Form("On", ("B1n", "B1n")),
    "all pairs": Form("n", ("B1n", "Cn")),
    "candidates": Form("n", ("B1n", "B1n", "BKn")),
    **{f"M={m}": Form("n", ("Bn",) * m) for m in range(1, reference.MAX_FACTORS + 1)},
    "no weights": Form(None, ("Bn", "Bn")),
    "weights per row": Form("Bn", ("Bn", "Bn")),
    "one weight per row": Form("B1", ("Bn", "Bn", "Bn")),
    "one weight": Form("", ("Bn", "Bn")),
    "weights per output": Form("nO", ("BnO", "BnO"), dim=1),
    "vector output, one factor shared": Form(None, ("BnO", "nO"), dim=-2),
    "terms in the weights only": Form("n", ("B1", "B1")),
    "terms in one factor only": Form(None, ("Bn", "B1")),
    "three dims": Form("n", ("ABn", "1Bn")),
    "four dims": Form("B1n", ("A1Kn", "BKn", "n")),
    "four dims, inner terms": Form("An11", ("1nBO", "An1O"), dim=1),
    "terms first": Form("n1", ("nB", "nB"), dim=0),
    "one dim": Form("n", ("n", "n")),
}


TABLE = ("paired", "vector output", "mixing", "all pairs", "candidates")  # the forms of the README

# Sums that split in two, and sums that do not, with sizes at which the former pass the tests' least extent.
SIZES = {"A": 3, "B": 19, "C": 13, "K": 2, "O": 11, "n": 17}
SPLIT = {
    "all pairs": Form("n", ("B1n", "Cn")),
    "mixing": Form("On", ("B1n", "B1n")),
    "two operands": Form(None, ("B1n", "Cn")),
    "weights and a factor": Form("On", ("B1n",)),
    "weights per row": Form("B11", ("B1n", "Cn")),
    "one weight": Form("", ("B1n", "Cn")),
    "a factor of terms only": Form("On", ("B1n", "n", "n")),
    "two factors a side": Form("n", ("B1n", "Cn", "B1n", "Cn")),
    "two axes a side": Form("n", ("AB11n", "CKn")),
    "an axis shared within a side": Form("n", ("AB1n", "B1n", "Cn")),
    "three groups": Form("n", ("AK11n", "B1n", "Cn")),
    "right first": Form("n", ("Cn", "B1n")),
    "terms first": Form("n11", ("nB1", "n1C"), dim=0),
    "terms in the middle": Form(None, ("Bn1", "nO"), dim=1),
    "axes of 1": Form("n", ("1B11n", "C1n")),
}
WHOLE = {
    "paired": Form("n", ("Bn", "Bn")),
    "vector output": Form("n1", ("BnO", "BnO"), dim=1),
    "candidates": Form("n", ("B1n", "B1n", "BKn")),
    "a batch of all pairs": Form("n", ("AB1n", "A1Cn")),
    "interleaved": Form("n", ("B1K1n", "1C11n")),
    "terms on one side": Form(None, ("B1n", "C1")),
    "few on one side": Form("n", ("B1n", "Kn")),
}


@dataclass
class Case:
    """The arguments of one call."""

    weights: Any
    factors: list[Any]
    activations: Any = None
    present: Any = None
    absent: str = "one"
    dim: int = -1

    @property
    def operands(self) -> list[np.ndarray]:
        """The weights, if any, and the factors."""
        return [*([] if self.weights is None else [self.weights]), *self.factors]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all operands, broadcast."""
        return np.broadcast_shapes(*(a.shape for a in self.operands))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The broadcast shape without `dim`."""
        axis = self.dim % len(self.shape)
        return self.shape[:axis] + self.shape[axis + 1 :]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of either function."""
        return {"activations": self.activations, "present": self.present, "absent": self.absent, "dim": self.dim}

    def forward(self) -> np.ndarray:
        """Call the function under test."""
        return fs.fusion_sum(self.weights, *self.factors, **self.options())

    def backward(self, grad_output: np.ndarray) -> list[np.ndarray]:
        """Return the gradients of `operands`."""
        grads = fs.fusion_sum_grad(grad_output, self.weights, *self.factors, **self.options())
        return list(grads[self.weights is None :])

    def mapped(self, function: Any) -> Case:
        """Apply the function to each operand; arrays of no dims stay arrays."""
        weights = None if self.weights is None else np.asanyarray(function(self.weights))
        return Case(weights, [np.asanyarray(function(z)) for z in self.factors], **self.options())

    def masked(self, rng: Any, masks: str, absent: str) -> Case:
        """Add masks: "rows", for each factor, of its own leading dims; "full", of all it broadcasts to."""
        axis = self.dim if self.dim < 0 else self.dim - len(self.shape)
        present: list[Any] = []
        for m, z in enumerate(self.factors):
            target = z.shape if masks == "rows" else self.shape[len(self.shape) - z.ndim :]
            shape = [1 if i - z.ndim == axis else n for i, n in enumerate(target)]
            while masks == "rows" and shape and shape[-1] == 1:
                shape.pop()
            present.append(np.asarray(rng.random(shape) > 0.4) if masks == "rows" or m % 2 == 0 else None)
        return Case(self.weights, self.factors, self.activations, present, absent, self.dim)


def random(rng: Any, shape: tuple[int, ...], dtype: str, kind: str = "normal") -> np.ndarray:
    """Random values that no product of eight takes out of float16's range by much."""
    values = {
        "normal": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "positive": lambda: rng.uniform(0.5, 1.5, shape),
        "log-normal": lambda: rng.lognormal(0, 1, shape),
        "heavy-tailed": lambda: np.clip(rng.standard_t(1.5, shape), -20, 20),
        "integers": lambda: rng.integers(-2, 3, shape),
    }[kind]()
    return np.asarray(values).astype(dtype)


def random_like(rng: Any, array: np.ndarray) -> np.ndarray:
    return random(rng, array.shape, array.dtype.name)


def widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def oracle(case: Case, grad_output: np.ndarray | None = None) -> list[np.ndarray]:
    """Evaluate the output, or the gradients of the operands, by the reference in float64."""
    wide = case.mapped(widened)
    checked = call.check(wide.weights, wide.factors, case.activations, case.present, case.absent, case.dim)
    if grad_output is None:
        return [reference.fusion_sum(*checked)]
    grads = reference.fusion_sum_grad(widened(grad_output), *checked, [True] * (1 + len(case.factors)))
    return list(grads[case.weights is None :])


def tolerances(case: Case, wanted: list[np.ndarray], grad_output: np.ndarray | None = None) -> list[np.ndarray]:
    """Class 1 of the error bounds: (terms + 6 M + 4) eps sum|w f g| of the accumulator, and the rounding of the result.

    Six eps per factor pay for its product and for an activation that is right to 4 ulp. The sum of magnitudes takes |z|
    for |phi(z)|, which bounds it for all but the sigmoid, because gelu's tail is right relative to |z| only. A sum that
    splits in two may be multiplied as pairs of bf16 (csrc/scores.h): both sides and Gamma are rounded to it.
    """
    given = case.operands + ([] if grad_output is None else [grad_output])
    eps = np.finfo("float64" if any(a.dtype == np.float64 for a in given) else "float32").eps
    names = call.spread(None, case.factors, case.activations, None, "one", -1).activations
    magnitudes = case.mapped(lambda z: abs(widened(z)))
    magnitudes.factors = [
        np.ones_like(z) if a == "sigmoid" else z for a, z in zip(names, magnitudes.factors, strict=True)
    ]
    magnitudes.activations = None
    scales = oracle(magnitudes, None if grad_output is None else abs(widened(grad_output)))
    results = case.operands if grad_output is not None else [None]
    found = []
    for want, scale, operand in zip(wanted, scales, results, strict=True):
        terms = case.shape[case.dim] if operand is None else np.prod(case.shape) / max(1, operand.size)
        rounding = ml_dtypes.finfo(reference.result_dtype(*case.operands) if operand is None else operand.dtype)
        relative = (terms + 6 * len(case.factors) + 4) * eps + (3.02 * 2**-8 if in_pairs(given) else 0)
        least = terms * 2.0**-124 if in_pairs(given) else float(rounding.smallest_subnormal)
        found.append(relative * scale + float(rounding.eps) * abs(want) + least)
    return found


def in_pairs(operands: list[np.ndarray]) -> bool:
    """Whether the instruction set in use multiplies sides of these as pairs of bf16, where it multiplies sides."""
    native = backend.native
    return native is not None and native.isa() == "avx512_bf16" and {a.dtype.name for a in operands} == {"bfloat16"}


def check_forward(case: Case, got: np.ndarray | None = None) -> None:
    got = case.forward() if got is None else got
    wanted = oracle(case)
    assert got.shape == case.output_shape
    assert got.dtype == reference.result_dtype(*case.operands)
    check_within(got, wanted[0], tolerances(case, wanted)[0])


def check_backward(case: Case, grad_output: np.ndarray, got: list[np.ndarray] | None = None) -> None:
    got = case.backward(grad_output) if got is None else got
    wanted = oracle(case, grad_output)
    for grad, operand, want, tol in zip(got, case.operands, wanted, tolerances(case, wanted, grad_output), strict=True):
        assert grad.shape == operand.shape
        assert grad.dtype == operand.dtype
        check_within(grad, want, tol)


def check_both(case: Case, rng: Any) -> None:
    """Check the output and every gradient against the oracle."""
    check_forward(case)
    check_backward(case, random(rng, case.output_shape, reference.result_dtype(*case.operands).name))


def check_within(got: np.ndarray, want: np.ndarray, tol: Any) -> None:
    ok = abs(widened(got) - want) <= tol  # so that NaN fails
    assert ok.all(), f"{(~ok).sum()} of {ok.size} differ; got {got[~ok][:4]}, want {want[~ok][:4]}"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def missing(what: str, required: str = "FUSIONSUM_REQUIRE_NATIVE") -> None:
    """Skip a test for want of something, or fail it where nothing of its kind may be missing, as in CI."""
    if os.environ.get(required, "0") not in ("", "0"):
        pytest.fail(f"{required} is set, but missing: {what}", pytrace=False)
    pytest.skip(f"missing: {what}", allow_module_level=True)


def source(name: str) -> pathlib.Path:
    """Return a file or folder of the source tree around these tests, which may be a copy, beside an installed wheel."""
    path = TESTS.parent / name
    if not path.exists():
        missing(f"{name}, of the source tree")
    return path


def require_compiler() -> None:
    """Skip a test that compiles, as Inductor does, where nothing can."""
    if not shutil.which("g++"):
        missing("g++")


def require_native() -> Any:
    if backend.native is None:
        missing(f"the native module, {fs.backends()['cpu']}")
    return backend.native


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference take nothing over: every call of the test is valid, and no kernel may decline it."""

    def declined(*arguments: Any) -> None:
        raise AssertionError("the kernels declined a valid call")

    monkeypatch.setattr(api, "check", declined)


def run_python(code: str, *, timeout: float = 180, **environment: str) -> str:
    """Run code in a fresh interpreter that finds this package and these tests; return what it printed."""
    paths = [str(PACKAGE.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Generate the same numbers for a test in every run and in any order."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def seed() -> Any:
    """Let torch draw the same numbers for a test in every run and in any order."""
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["native", "numpy"])
def both_backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the kernels and on the reference: errors and results must not tell which."""
    if request.param == "native":
        require_native()
    monkeypatch.setattr(api, "native", backend.native if request.param == "native" else None)
    return request.param
