from lora_kernels.cli import main


def test_shows_every_layer(tiny_model, capsys):
    assert main(["explain", "--model", str(tiny_model), "--targets", "query,dense", "--r", "4"]) == 0
    shown = capsys.readouterr().out
    assert "attention.self.query" in shown
    assert "not in target_modules" in shown
    assert "reference" in shown
    assert "trainable" in shown


def test_the_task_type_brings_its_head(tiny_model, capsys):
    assert main(["explain", "--model", str(tiny_model), "--task-type", "SEQ_CLS"]) == 0
    assert "classifier: trained whole" in capsys.readouterr().out


def test_mistakes_are_one_clear_line(tiny_model, tmp_path, capsys):
    assert main(["explain", "--model", str(tiny_model), "--targets", "nothing"]) == 2
    assert main(["explain", "--model", str(tmp_path / "missing")]) == 2
    assert main(["explain", "--model", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("lora-kernels explain: ") for line in lines)
