"""The database of a sweep's studies: open it, and convert its errors to ConfigError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_kernels.errors import ConfigError, LoRAKernelsError
from lora_kernels.finetune.train.extras import require

_LIBRARIES = ("optuna", "sqlalchemy", "sqlite3", "alembic")  # libraries whose errors concern the database


def storage(path: Path) -> Any:
    """Open optuna's storage in the SQLite file ``path``, which is created if it does not exist."""
    return require("optuna").storages.RDBStorage(f"sqlite:///{quote(str(path))}")  # quoted: a "?" would end the path


@contextmanager
def usable(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Convert errors of optuna, of its database and of the classes ``more`` (raised by damaged rows) to ConfigError."""
    try:
        yield
    except LoRAKernelsError:
        raise
    except Exception as error:
        if not isinstance(error, more) and type(error).__module__.split(".")[0] not in _LIBRARIES:
            raise
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise ConfigError(
            f"the study {path} cannot be used ({type(cause).__name__}: {reason}): wait until no other sweep uses "
            "it, free space if the disk is full, else pass --overwrite or another --out"
        ) from error
