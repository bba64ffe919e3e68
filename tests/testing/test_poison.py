"""Memory that nobody wrote is NaN, wherever it was allocated."""

import pytest
import torch

from lora_kernels.testing import poison

ALLOCATIONS = {
    "empty": lambda: torch.empty(4, 3),
    "empty, leaf": lambda: torch.empty(4, requires_grad=True),
    "empty_like": lambda: torch.empty_like(torch.zeros(4).bfloat16()),
    "empty_strided": lambda: torch.empty_strided((4, 3), (1, 8)),
    "new_empty": lambda: torch.zeros(1).half().new_empty(4),
    "new_empty_strided": lambda: torch.zeros(1).new_empty_strided((4,), (2,)),
    "8 bits": lambda: torch.empty(4, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_allocations_hold_nan(allocation: str) -> None:
    with poison():
        memory = ALLOCATIONS[allocation]()
    assert memory.float().isnan().all()


def test_integers_are_left_alone_and_other_constructors_work() -> None:
    with poison():
        assert torch.empty(4, dtype=torch.int64).shape == (4,)
        assert torch.zeros(4).eq(0).all()
        assert torch.nn.Linear(3, 4)(torch.ones(2, 3)).isfinite().all()


def test_memory_allocated_inside_a_custom_operator_is_poisoned() -> None:
    library = torch.library.Library("lora_kernels_test_poison", "DEF")
    library.define("half_written(Tensor X) -> Tensor")

    def half_written(X: torch.Tensor) -> torch.Tensor:
        Y = torch.empty_like(X)
        Y[: len(X) // 2] = X[: len(X) // 2]
        return Y

    library.impl("half_written", half_written, "CPU")
    with poison():
        Y = torch.ops.lora_kernels_test_poison.half_written(torch.ones(4))
    assert Y.isnan().tolist() == [False, False, True, True]


def test_the_functions_are_restored() -> None:
    functions = torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty
    with pytest.raises(KeyError), poison():
        raise KeyError
    assert functions == (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    assert "new_empty" not in vars(torch.Tensor)
