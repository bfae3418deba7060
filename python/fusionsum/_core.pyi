# The native module, csrc/bindings/. The first two functions take the fields of call.Call in their order. They return
# NotImplemented for a call that is not wholly valid (call.check then finds the error), and for tensors while modes or
# transforms of torch watch calls, unless the caller vouches by `trusted` that none of them needs to see this one.
from collections.abc import Sequence
from typing import Any

def fusion_sum(
    fusion_weights: Any, factors: tuple[Any, ...], activations: Any, present: Any, absent: Any, dim: Any, trusted: bool
) -> Any: ...
def fusion_sum_grad(
    grad_output: Any,
    fusion_weights: Any,
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
