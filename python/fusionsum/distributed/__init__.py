"""Losses and search over rows on several processes of torch.distributed.

The functions are the package's own, given a process group: ``contrastive_loss(..., group=dist.group.WORLD)``. Here is the
object that says more than a group does: `Exchange`. What lives where:

* ``exchange.py``: how rows on several processes meet;
* ``losses.py``, ``search.py``: what travels, and what is made of it.

What lives elsewhere: the tiles, which know of no processes (``tensors.py``); the functions' documentation (``losses.py``
and ``search.py`` of the package).
"""

from .exchange import Exchange

__all__ = ["Exchange"]
