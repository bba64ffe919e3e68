import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lora_kernels.finetune.train.digest import data_digest, digest, frozen_digest


def test_equal_content_has_an_equal_digest_and_other_content_another():
    x = torch.arange(6, dtype=torch.int64)
    values = [
        None, True, 1, 1.5, "1", b"1", [1, 2], [[1], [2]], [[1, 2]], {"a": 1}, {"a": x}, {"b": x}, x, x.view(2, 3),
        x.int(), x.double(), x.to(torch.bfloat16), x.numpy(), x.numpy().astype("f4"), np.float32(1), ["ab", "c"],
        ["a", "bc"], [x, x], [x], torch.tensor(1.0), torch.zeros(0), torch.zeros(0, 2), "\udcff", [], [[]],
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert digests == [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest(x[::2]) == digest(x[::2].clone())
    assert digest(1, 2) != digest(12)
    with pytest.raises(TypeError, match="no digest of a object"):
        digest([[object()]])
    with pytest.raises(TypeError, match="Python objects"):
        digest(np.array([object()]))


class Drawn(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(3)


def test_data_in_memory_have_a_digest():
    rows = [([1, 2, 3], 0), ([4], 1)]
    tensors = TensorDataset(torch.arange(4.0), torch.arange(4))
    datasets = [rows, rows[::-1], tensors, Subset(tensors, [0, 1]), Subset(tensors, [1, 0]),
                ConcatDataset([tensors, rows])]  # fmt: skip
    digests = [data_digest(DataLoader(dataset, 2)) for dataset in datasets]
    assert None not in digests
    assert len(set(digests)) == len(digests)
    assert digests[0] == data_digest(DataLoader(list(rows), 1, shuffle=True))
    for unread in (DataLoader(Drawn(), 2), None, object(), DataLoader([object()], 1), DataLoader(Subset(Drawn(), [0]))):
        assert data_digest(unread) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_frozen_weights_have_a_digest(dtype):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(dtype).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    first = frozen_digest(model)
    with torch.no_grad():
        model[1].weight.zero_()
    assert frozen_digest(model) == first, "a trained parameter is not frozen"
    model[0].weight.view(torch.uint8)[1, 1] ^= 1
    assert frozen_digest(model) != first
    model[1].weight.requires_grad_(False)
    assert frozen_digest(model.to("meta")) != first
