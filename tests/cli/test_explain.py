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


def test_one_layer_on_a_gpu_that_is_not_here(tiny_model, capsys):
    path = "encoder.layer.1.attention.self.key"
    assert main(["explain", "--model", str(tiny_model), "--layer", path, "--chip", "sm_80", "--tokens", "64"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(path)
    assert "forward: M=64 N=16 K=16 r=16 float32, bias on sm_80" in shown
    assert "refused: sm_80 has no TMA" in shown
    assert "runs: model" in shown
    assert main(["explain", "--model", str(tiny_model), "--chip", "sm_90"]) == 0
    assert "triton (" in capsys.readouterr().out
    assert main(["explain", "--model", str(tiny_model), "--layer", "pooler"]) == 2
    assert "'pooler' is no LoRALinear of this model; such are encoder" in capsys.readouterr().err
