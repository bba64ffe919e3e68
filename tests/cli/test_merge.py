import pytest
import torch

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.cli import main
from lora_kernels.layers import LoRALinear

IDS = torch.tensor([[2, 4, 10, 3]])


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """Make a folder with an adapter of a classifier with three classes; return its logits too."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    apply_lora(model, LoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model.eval()(IDS).logits


def test_the_merged_model_needs_nothing_of_ours(tiny_model, adapter, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, expected = adapter
    options = ["--adapter", str(folder), "--model", str(tiny_model), "--out", str(tmp_path / "merged")]
    assert main(["merge", *options, "--labels", "bad,fair,good"]) == 0
    shown = capsys.readouterr()
    assert "13 layers merged" in shown.out
    assert shown.err == ""
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    assert not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, expected)
    assert plain.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("great film")["input_ids"] == [2, 6, 10, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_mistakes_are_one_clear_line(tiny_model, adapter, tmp_path, capsys):
    folder, _ = adapter
    options = ["merge", "--adapter", str(folder), "--model", str(tiny_model)]
    assert main([*options, "--out", str(tmp_path)]) == 2
    assert main([*options, "--out", str(tmp_path / "merged"), "--labels", "good,bad"]) == 2
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main([*options, "--out", str(tmp_path / "merged")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [part in line for part, line in zip(("exists", "3 classes", "truncated"), lines, strict=True)] == [True] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
