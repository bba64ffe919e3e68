"""The models, adapters and pools of tests/adapters/conftest.py, for the tests of the pool."""

from tests.adapters.conftest import adapter, folder, model, pool, served, toy

__all__ = ["adapter", "folder", "model", "pool", "served", "toy"]
