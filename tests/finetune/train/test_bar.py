from lora_kernels.finetune.train.bar import ProgressBar


def test_shows_loss_and_tokens_per_second(capsys):
    with ProgressBar("epoch 1/2", 4) as bar:
        bar.advance(2, 0.5, 100)
        bar.advance(2, 0.25, 100)
    shown = capsys.readouterr().err
    assert "epoch 1/2: 100%" in shown
    assert "loss 0.375" in shown
    assert "tokens/s" in shown


def test_silent_when_not_shown(capsys):
    with ProgressBar("epoch 1/2", 4, shown=False) as bar:
        bar.advance(2, 0.5, 100)
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_stdout(capsys):
    ProgressBar.write("a line")
    assert capsys.readouterr().out == "a line\n"
