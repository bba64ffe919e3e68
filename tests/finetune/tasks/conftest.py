import random
from pathlib import Path

import pytest
import torch

from lora_kernels.finetune.data.phrases import phrases


def save_tokenizer(folder: Path, words: list[str], eos: bool) -> None:
    """Make a tokenizer with vocabulary ``words`` that appends <eos> if required."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos:
        tokens.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokens, **names).save_pretrained(folder)


def words_of(texts: list[str]) -> list[str]:
    return sorted({word for text in texts for word in text.replace(".", " . ").replace(",", " , ").split()})


@pytest.fixture(scope="session")
def tiny_translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 of one small layer each and a tokenizer of the phrases' words."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("translator")
    pairs = phrases(1000)
    words = words_of(pairs.sources + pairs.targets)
    save_tokenizer(folder, words, eos=True)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(words) + 3, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of one small layer and a tokenizer of a dozen words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("writer")
    save_tokenizer(folder, list("abcdefghijkl"), eos=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=15, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a text of letters in cyclic order."""
    draw, letters = random.Random(0), "abcdefghijkl"
    rows = [" ".join(letters[(start + i) % 12] for i in range(16)) for start in draw.choices(range(12), k=200)]
    path = tmp_path_factory.mktemp("text") / "alphabet.txt"
    path.write_text("\n".join(rows))
    return path
