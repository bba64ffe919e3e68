from lora_kernels.finetune.train.options import History
from lora_kernels.finetune.train.plot import plot_history

STEPS = [{"step": i + 1, "epoch": i // 3, "loss": 1 / (i + 1), "lr": 0.1, "weight": 4.0} for i in range(6)]


def test_writes_a_picture(tmp_path):
    epochs = [{"epoch": e, "loss": 0.5, "val_loss": 0.4, "val_accuracy": 0.8} for e in range(2)]
    plot_history(History(steps=STEPS, epochs=epochs), tmp_path / "new" / "curve.png")
    picture = (tmp_path / "new" / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_without_validation(tmp_path):
    plot_history(History(steps=STEPS, epochs=[{"epoch": 0, "loss": 0.5}]), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
