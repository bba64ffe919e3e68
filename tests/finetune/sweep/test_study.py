import sqlite3

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.sweep.study import storage, usable


@pytest.mark.parametrize("name", ["plain", "a?b", "a?mode=ro", "50%25", "a b#c"])
def test_the_study_is_in_its_folder_whatever_its_name(tmp_path, name):
    """Without quoting, a "?" in the name ends the path, and the study is written beside the folder."""
    folder = tmp_path / name
    folder.mkdir()
    storage(folder / "sweep.db")
    assert [path.name for path in folder.iterdir()] == ["sweep.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + bytes(2000)])
def test_a_damaged_study_is_one_sentence(tmp_path, content):
    file = tmp_path / "sweep.db"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"sweep\.db cannot be used .*pass --overwrite"), usable(file):
        storage(file)


def test_a_locked_study_is_one_sentence(tmp_path):
    file = tmp_path / "sweep.db"
    with pytest.raises(ConfigError, match=r"database is locked.*wait until no other sweep"), usable(file):
        raise sqlite3.OperationalError("database is locked")


def test_other_errors_pass_unless_they_are_named(tmp_path):
    with pytest.raises(KeyError), usable(tmp_path):
        raise KeyError("record")
    with pytest.raises(ConfigError, match="KeyError"), usable(tmp_path, KeyError):
        raise KeyError("record")
    with pytest.raises(ConfigError, match=r"^as it is$"), usable(tmp_path, ValueError):
        raise ConfigError("as it is")
