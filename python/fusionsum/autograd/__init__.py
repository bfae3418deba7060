"""The fusion sum for tensors: autograd of every order, forward mode, ``torch.func``, ``torch.compile`` and export.

Losses and search over scores alike, but for derivatives beyond the first, and forward mode, which the losses lack.

Importing this package registers the operations with torch. What lives where:

* ``routing.py``: which way a call of tensors takes;
* ``dtensor.py``: the sum of DTensors, by the sums of their shards;
* ``derivatives.py``: the sum's derivatives, whatever watches the call;
* ``losses.py``, ``search.py``: what is built on scores, with the operations' records; ``sides.py``: what they share;
* ``vmap.py``: a batch axis in front of every operand, or item by item;
* ``operations.py``: what torch is told of each of the sum's operations, one record each;
* ``schema.py``: how a `Call`, `Scores` or `Search` becomes arguments of a registered operation;
* ``registration.py``: the machinery that takes such a record.

What lives elsewhere: the kernels for plain tensors (``tensors.py``, ``contraction.py``), the formulas (``reference.py``).

Autocast changes nothing: operands are taken as they come and promote, as in ``torch.mul``, compiled or not. Limits of
torch's, each an error: ``torch.compile`` has no double backward and no ``torch.func.grad`` of a registered operation, and
``torch.jit.trace`` no lists of optional tensors.
"""

from . import losses, search  # noqa: F401  (their operations are registered when they are imported)
from .routing import fusion_sum, fusion_sum_grad

__all__ = ["fusion_sum", "fusion_sum_grad"]
