from pathlib import Path

import pytest
import torch

from benchmarks.curves import PEFT
from benchmarks.demo_curve import ACCELERATED, demo_curve
from lora_kernels.finetune.tasks import Classification
from lora_kernels.integrations.peft import linear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Classification:
    table: Path = tmp_path_factory.mktemp("data") / "films.csv"
    lines = [f"{'a dull plot' if n % 2 else 'a lovely film'} number {n},{n % 2}" for n in range(200)]
    table.write_text("\n".join(["text,label", *lines]))
    return Classification(data=str(table), limit=96, max_length=8)


def test_the_accelerated_curve_is_pefts(task: Classification) -> None:
    outcome = demo_curve(4, CPU, task)
    (check,) = outcome.checks
    assert (check.implementation, check.status) == (ACCELERATED, "ok")
    assert len(outcome.curves) == 4 * 4  # PEFT, its twins and ours; steps
    assert [row.implementation for row in outcome.rows] == [PEFT, ACCELERATED]


def test_a_wrong_scaling_is_noticed(task: Classification, monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.operands

    def wrong(*args: object) -> object:
        found = right(*args)  # type: ignore[arg-type]
        return found if isinstance(found, str) else found._replace(scaling=1.01 * found.scaling)

    monkeypatch.setattr(linear, "operands", wrong)
    assert [check.status for check in demo_curve(4, CPU, task).checks] == ["failed"]
