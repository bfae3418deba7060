"""Plain tensors to the kernels and back: the devices that have none.

What lives elsewhere: values and gradients of tensors (``test_autograd_derivatives.py``).
"""

from __future__ import annotations

import pytest
import torch

from fusionsum import tensors


@pytest.mark.parametrize(("device", "said"), [("cuda:0", "move them to the CPU"), ("mps", "expected cpu or cuda")])
def test_a_tensor_where_there_are_no_kernels_is_an_error_that_says_what_to_do(device, said):
    place = torch.device(device)

    class Far(torch.Tensor):
        device = place

    with pytest.raises(ValueError, match=said) as error:
        tensors._array(torch.ones(3).as_subclass(Far))
    assert device in str(error.value)
