import pytest
import torch

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.tasks.pretrained import MINILM, load_pretrained, load_tokenizer, locate


def test_the_packaged_model_loads_offline(monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_pretrained("AutoModelForSequenceClassification", MINILM, num_labels=3)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.classifier.out_features == 3
    assert model.dtype == torch.float32
    ids = load_tokenizer(MINILM)("I love programming")["input_ids"]
    assert model(torch.tensor([ids])).logits.shape == (1, 3)
    assert capfd.readouterr() == ("", "")


def test_the_dtype_is_asked_for():
    assert load_pretrained("AutoModel", MINILM, "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int3'; it must be one of auto"):
        load_pretrained("AutoModel", MINILM, "int3")


def test_other_names_are_left_as_they_are():
    assert locate("owner/model") == "owner/model"


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ConfigError) as refused:
            load_pretrained("AutoModel", name)
        assert "\n" not in str(refused.value)


def test_a_pickle_is_not_read(tmp_path):
    model = load_pretrained("AutoModel", MINILM)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained("AutoModel", str(tmp_path))
