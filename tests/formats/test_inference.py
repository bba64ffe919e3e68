"""Weights created in inference mode, for autograd to save."""

import torch

from lora_kernels.formats.inference import savable


def test_the_same_memory_in_a_tensor_that_can_be_saved():
    with torch.inference_mode():
        base = torch.randn(4, 6)
        views = {"whole": base, "transposed": base.t(), "part": base[1:, ::2], "empty": base[:0]}
    for name, W in views.items():
        found = savable(W)
        assert not found.is_inference(), name
        assert found.untyped_storage().data_ptr() == W.untyped_storage().data_ptr(), name
        assert (found.stride(), found.storage_offset()) == (W.stride(), W.storage_offset()), name
        assert torch.equal(found, W.clone()), name
        x = torch.randn(2, W.shape[0], requires_grad=True)
        (x @ found).sum().backward()
        torch.testing.assert_close(x.grad, found.sum(1).expand(2, -1))


def test_any_other_tensor_is_itself():
    W = torch.randn(3, 2)
    assert savable(W) is W


def test_within_inference_mode():
    with torch.inference_mode():
        W = torch.randn(3, 2)
        assert not savable(W).is_inference()
