# The native module, csrc/bindings. The first two functions return NotImplemented for a call that is not wholly
# as it should be (api.py then finds the error), and for tensors while torch watches calls, by modes or transforms, unless
# `trusted` says that this is seen to.
from collections.abc import Sequence
from typing import Any

def fusion_sum(
    weights: Any, factors: tuple[Any, ...], activations: Any, present: Any, absent: Any, dim: Any, trusted: bool
) -> Any: ...
def fusion_sum_grad(
    grad_output: Any,
    weights: Any,
    factors: tuple[Any, ...],
    activations: Any,
    present: Any,
    absent: Any,
    dim: Any,
    needs: Sequence[bool],
    trusted: bool,
) -> Any: ...
def isa() -> str: ...
def isas() -> list[tuple[str, bool]]: ...
def thread_backend() -> str: ...
def set_num_threads(count: int) -> None: ...
def get_num_threads() -> int: ...
def use_torch(module: Any, parallel_for: int | None, num_threads: int | None, load_cuda: Any) -> None: ...
def use_cuda(address: int) -> str | None: ...

dtypes: tuple[str, ...]  # as csrc/lists.h has them
activations: tuple[str, ...]
