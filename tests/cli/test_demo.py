import json

from lora_kernels.cli import main


def test_the_demo_is_a_train_command(tiny_model, tiny_data, tmp_path, capsys):
    options = ["--model", str(tiny_model), "--data", str(tiny_data), "--limit", "64", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 0
    shown = capsys.readouterr()
    assert "tokens/s" in shown.err
    assert "64 train, 32 validation, 32 test" in shown.out
    assert "PEFT" in shown.out
    command = (tmp_path / "reproduce.sh").read_text()
    assert command.startswith("lora-kernels train ")
    assert "--limit 64" in command
    assert json.loads((tmp_path / "metrics.json").read_text())["beside_peft"]["rounds"] == 16
    assert main(["demo", *options]) == 0  # again, over the same folder


def test_a_mistake_is_one_clear_line(tiny_model, tmp_path, capsys):
    (tmp_path / "x.csv").write_bytes(bytes(range(256)))
    assert main(["demo", "--model", str(tiny_model), "--data", str(tmp_path / "x.csv"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"lora-kernels demo: {tmp_path}/x.csv")
