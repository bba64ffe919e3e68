import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.options import TrainOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate", 0),
        ("keep", 0),
        ("checkpoint_every", -1),
        ("warmup", -0.1),
        ("warmup", float("nan")),
        ("clip_norm", 0.0),
        ("patience", 0),
        ("schedule", "step"),
    ],
)
def test_nonsense_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainOptions(**{name: value})


def test_what_decides_the_result():
    constant = TrainOptions(settings={"lr": 0.1}, keep=5, progress=False)
    assert constant.decisive(2, 10) == constant.decisive(9, 10)
    assert constant.decisive(2, 10)["lr"] == 0.1
    assert constant.decisive(2, 10) != constant.decisive(2, 11)
    cosine = TrainOptions(schedule="cosine")
    assert cosine.decisive(2, 10) != cosine.decisive(3, 10)
    assert cosine.decisive(2, 10) == TrainOptions(schedule="cosine", checkpoint_every=3, keep=9).decisive(2, 10)
