import pytest
import torch

from benchmarks.models import SIZES, batches, build, rows_reversed, rows_rotated

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", list(SIZES))
def test_a_seed_gives_the_same_model_and_data_twice_and_dropout_is_off(model: str) -> None:
    size = SIZES[model]["rehearsal"]
    one, other = (build(model, size, CPU, torch.float32) for _ in range(2))
    (batch,), (again,) = (batches(model, size, 1, CPU) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["input_ids"].shape == (size.rows, size.tokens)
    assert int(batch["input_ids"].max()) < size.vocabulary
    with torch.no_grad():
        assert torch.equal(one(**batch).loss, other(**batch).loss)
        assert torch.equal(one(**batch).loss, one(**batch).loss)
        for reordered in (rows_reversed, rows_rotated):
            torch.testing.assert_close(one(**reordered(batch)).loss, one(**batch).loss)
            assert not torch.equal(reordered(batch)["input_ids"], batch["input_ids"])


def test_the_data_can_be_learnt() -> None:
    size = SIZES["llama"]["cpu"]
    tokens = batches("llama", size, 1, CPU)[0]["input_ids"]
    follows = torch.randperm(size.vocabulary, generator=torch.Generator().manual_seed(0))
    assert (follows[tokens[:, :-1]] == tokens[:, 1:]).float().mean() > 0.8
    batch = batches("bert", SIZES["bert"]["cpu"], 1, CPU)[0]
    upper = (batch["input_ids"] >= 256).float().mean(dim=1)
    assert torch.equal(upper > 0.5, batch["labels"] > 0)


def test_gpu_sizes_are_those_of_the_models_they_name() -> None:
    llama, bert = SIZES["llama"]["gpu"], SIZES["bert"]["gpu"]
    assert (llama.width, llama.inner, llama.heads, llama.kv_heads) == (4096, 14336, 32, 8)
    assert (bert.width, bert.inner, bert.layers) == (768, 3072, 12)
    assert llama.batch_tokens == bert.batch_tokens == 8192
