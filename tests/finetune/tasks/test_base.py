import argparse

import pytest

from lora_kernels.finetune.tasks import TASKS, Task
from lora_kernels.finetune.tasks.base import PARTS


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_comes_from_its_own_options(name):
    task = TASKS[name]
    parser = argparse.ArgumentParser()
    task.add_arguments(parser)
    assert task.from_arguments(parser.parse_args([])) == task()
    assert task().settings()["task"] == task.name == name
    assert set(vars(parser.parse_args([]))) == set(task().settings()) - {"task"}


def test_a_task_must_be_whole():
    with pytest.raises(TypeError, match="abstract"):
        Task()
    assert PARTS == ("train", "validation", "test")
