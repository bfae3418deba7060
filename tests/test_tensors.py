"""Plain tensors to the kernels and back: the devices that have none, and what the kernels of scores are handed.

What lives elsewhere: values and gradients of tensors (``test_autograd_derivatives.py``).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fusionsum as fs
from fusionsum import reference, tensors


@pytest.mark.parametrize(("device", "said"), [("cuda:0", "move them to the CPU"), ("mps", "expected cpu or cuda")])
def test_a_tensor_where_there_are_no_kernels_is_an_error_that_says_what_to_do(device, said):
    place = torch.device(device)

    class Far(torch.Tensor):
        device = place

    with pytest.raises(ValueError, match=said) as error:
        tensors._array(torch.ones(3).as_subclass(Far))
    assert device in str(error.value)


class Native:
    """Stands for the native module's functions of scores: takes tensors and integer arrays, and gives both back."""

    def __init__(self, declines=False):
        self.asked, self.declines = [], declines

    def __getattr__(self, name):
        if name not in ("softmax_stats", "softmax_grad", "sigmoid_stats", "sigmoid_grad", "top_k", "ranks"):
            return lambda *given: NotImplemented

        def function(*given):
            *arguments, trusted = given
            assert trusted is True
            for group in arguments[:2]:
                assert all(type(x) is torch.Tensor for x in group)
            for x in arguments:
                integers = isinstance(x, np.ndarray) and x.dtype.kind == "i"
                assert not isinstance(x, np.ndarray) or x.flags.c_contiguous
                assert not (isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dtype != torch.bool)
                assert not integers or x.dtype in (np.int32, np.int64)
            self.asked.append(name)
            if self.declines:
                return NotImplemented
            found = getattr(reference, name)(*map(tensors._viewed, arguments))
            if name in ("softmax_stats", "sigmoid_stats", "ranks"):
                return found
            if name == "top_k":
                return torch.from_numpy(found[0]), found[1]
            sides = 0 if name == "softmax_grad" else 1
            return tuple(
                torch.from_numpy(x) if sides <= i < sides + 2 and x is not None else x for i, x in enumerate(found)
            )

        return function


@pytest.mark.parametrize("declines", [False, True])
def test_scores_go_to_the_kernels(declines, monkeypatch):
    """Tensors go as they are and integers as arrays; what is declined the reference evaluates."""
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3).bfloat16()
    labels, key_labels, mask = torch.arange(4), torch.arange(6) % 3, torch.rand(4, 6) > 0.7
    steps = (
        lambda: fs.contrastive_loss(q, k, labels=labels, key_labels=key_labels, exclude=mask, key_bias=torch.ones(6)),
        lambda: fs.contrastive_loss(q, k, exclude=(labels, key_labels), symmetric=False, logit_scale=torch.tensor(2.0)),
        lambda: fs.sigmoid_loss((q, q), k, fusion_weights=torch.ones(3)),
        lambda: fs.sigmoid_loss(q, k, reduction="none").sum(),
        lambda: fs.top_k(q, k, 2, exclude=[[0], [1, 2], [], [3]])[0].sum(),
    )
    results = []
    for native in (Native(declines), None):
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "native", native)
            for step in steps:
                loss = step()
                results.append((loss.detach(), torch.autograd.grad(loss, q)[0]))
            results.append((fs.ranks(q.detach(), k, labels, exclude=mask), fs.top_k(q.detach(), k, 6)[1]))
        if native is not None:
            asked = native.asked
    count = len(results) // 2
    torch.testing.assert_close(results[:count], results[count:], rtol=0, atol=0)
    assert set(asked) == {"softmax_stats", "softmax_grad", "sigmoid_stats", "sigmoid_grad", "top_k", "ranks"}
