import csv
import math

import pytest

from lora_kernels.finetune.sweep.report import chance, pareto, plot, write_csv
from lora_kernels.finetune.sweep.sweep import Record
from lora_kernels.finetune.sweep.trial import FULL, HEAD_ONLY, LORA, Outcome


def record(value, trainable=100, kind=LORA, state="complete", seed=0, **params):
    return Record(kind, params, seed, Outcome(state, value, trainable, trainable / 10, trainable / 5, 400))


BEST = record(0.84, 300, r=8)
RECORDS = [
    record(0.70, 100, r=2),
    BEST,
    record(0.83, 200, r=4),
    record(0.80, 400, r=16),
    record(0.9, 50, state="pruned", r=1),
    record(math.nan, 10, state="diverged", r=64),
    record(0.80, 300, f"{LORA}, repeated", seed=1, r=8),
    record(0.82, 300, f"{LORA}, repeated", seed=2, r=8),
    record(0.85, 5000, FULL, lr=1e-4),
    record(0.60, 5, HEAD_ONLY, lr=1e-2),
]


def test_the_front_holds_what_nothing_beats():
    def cost(record):
        return record.outcome.trainable

    front = [r.outcome.trainable for r in pareto(RECORDS, cost, lower=False)]
    assert front == [5, 100, 200, 300, 5000]
    assert [r.outcome.trainable for r in pareto(RECORDS, cost, lower=True)] == [5]
    tie = [record(0.5, 2), record(0.6, 2), record(0.6, 3)]
    assert pareto(tie, cost, lower=False) == [tie[1]]


def test_noise_is_described():
    text = "\n".join(chance(BEST, RECORDS, "accuracy", lower=False))
    assert "0.8400 (seed 0), 0.8000 (seed 1), 0.8200 (seed 2); mean 0.8200, standard deviation 0.0200" in text
    assert "on 400 rows: 0.0183" in text
    assert "2 of 4 complete trials lie within 0.0200 of the best" in text
    assert "the smallest of them: 200 parameters, accuracy 0.8300; r 4" in text
    alone = "\n".join(chance(BEST, RECORDS[:6], "loss", lower=True))
    assert "how much of the best value is luck is unknown" in alone
    assert "standard error" not in alone
    assert "within" not in alone


def test_the_table_on_disk(tmp_path):
    write_csv(RECORDS, tmp_path / "sweep.csv", {1: "lora-kernels train --r 8"})
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RECORDS)
    assert rows[1] == {
        "kind": "LoRA", "state": "complete", "value": "0.84", "trainable": "300", "seconds": "30.0", "wall": "60.0",
        "rows": "400", "seed": "0", "lr": "", "r": "8", "command": "lora-kernels train --r 8",
    }  # fmt: skip
    assert rows[8]["lr"] == "0.0001"


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], RECORDS[5:6]], ids=["all", "one", "nothing to show"])
def test_the_picture(tmp_path, records):
    paths = [tmp_path / "sweep.png", tmp_path / "sweep.svg"]
    plot(records, paths, "accuracy", False, lambda record: "q,v")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in paths[1].read_text()
