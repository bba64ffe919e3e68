"""What another thread does at a fork keeps no child waiting: the child takes every lock of the package."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from lora_kernels.locks import fork_safe_lock, fork_safe_rlock

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# ``hold`` runs in another thread until it calls wait(); ``child`` runs in the child, forked meanwhile.
PROGRAM = """
import faulthandler, os, threading
from lora_kernels.locks import fork_safe_lock, fork_safe_rlock

{setup}
reached, done = threading.Event(), threading.Event()

def wait(*_):
    reached.set()
    assert done.wait(1000)

{hold}
def child():
{child}

thread = threading.Thread(target=hold)
thread.start()
assert reached.wait(1000)
pid = os.fork()
if pid == 0:
    faulthandler.dump_traceback_later(300, exit=True)  # a hang ends so, and only a hang
    try:
        child()
    except BaseException as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
done.set()
thread.join()
raise SystemExit(status)
"""


def forked(setup: str, hold: str, child: str) -> tuple[int, str]:
    """The child's exit status, and what both processes printed."""
    setup, hold, child = map(textwrap.dedent, (setup, hold, child))
    code = PROGRAM.format(setup=setup, hold=hold, child=textwrap.indent(child, "    "))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("kind", ["fork_safe_lock", "fork_safe_rlock"])
def test_a_lock_that_another_thread_holds_is_free_in_the_child(kind):
    hold = """
        def hold():
            with lock:
                wait()
    """
    child = """
        with lock:
            assert not lock.acquire(blocking=False) or kind == "fork_safe_rlock"
    """
    assert forked(f"kind = {kind!r}\nlock = {kind}()", hold, child) == (0, "")


def test_a_lock_that_the_forking_thread_holds_is_the_childs():
    lock = fork_safe_rlock()
    with lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if lock._is_owned() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not lock._is_owned()


def test_they_are_the_locks_of_the_standard_library():
    assert isinstance(fork_safe_lock(), type(threading.Lock()))
    assert isinstance(fork_safe_rlock(), type(threading.RLock()))


POOL = """
    import torch
    import lora_kernels as lk
    from lora_kernels.pool import pool, state as pool_state
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    adapters = lk.AdapterPool(model, capacity=3, max_rank_total=12, target_modules=["0"])
    names = ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    tensors = dict(zip(names, (torch.randn(2, 8), torch.randn(6, 2))))
    config = lk.LoRAConfig(r=2, target_modules=["0"])
    adapters.load("a", tensors, config)
    x = torch.randn(1, 8)
    with adapters.batch(["a"]):
        expected = model(x)
"""


def test_a_pool_of_which_another_thread_holds_the_lock():
    hold = """
        def hold():
            with adapters._lock:
                wait()
    """
    child = """
        with adapters.batch(["a"]):
            assert torch.equal(model(x), expected)
        adapters.load("b", tensors, config)
        assert adapters.names == ("a", "b") and "a" in repr(adapters)
        adapters.evict("b")
        adapters.close()
    """
    assert forked(POOL, hold, child) == (0, "")


def test_a_pool_into_which_another_thread_loads():
    """It reads the adapter: nothing of the pool is changed yet."""
    hold = """
        real = pool.convert_updates

        def slow(*args):
            wait()
            return real(*args)

        def hold():
            pool.convert_updates = slow
            adapters.load("b", tensors, config)
    """
    child = """
        pool.convert_updates = real
        with adapters.batch(["a"]):
            assert torch.equal(model(x), expected)
        adapters.load("c", tensors, config)
        assert adapters.names == ("a", "c")
    """
    assert forked(POOL, hold, child) == (0, "")


def test_a_pool_into_which_another_thread_writes_is_refused_in_the_child():
    """Which rows are whose is not known there."""
    hold = """
        real = pool_state.write

        def slow(*args):
            real(*args)
            wait()

        def hold():
            pool_state.write = slow
            adapters.load("b", tensors, config)
            assert adapters.names == ("a", "b")
            with adapters.batch(["a"]):
                assert torch.equal(model(x), expected)
    """
    child = """
        with adapters.batch(["a"]):
            pass
    """
    status, printed = forked(POOL, hold, child)
    assert status == 1
    assert printed.startswith("AdapterPoolError: this process was forked while another thread wrote an adapter")


@pytest.mark.slow
def test_siblings_of_which_another_thread_learns():
    setup = """
        import torch
        from lora_kernels.integrations.peft import groups, sharing
        from tests.integrations.peft.siblings import adapted, example, gradients, same
        torch.set_num_threads(1)
        model, twin = adapted(), adapted(group=False)
        expected = gradients(twin, example())
    """
    hold = """
        def hold():
            with sharing._lock:
                wait()
    """
    child = """
        for _ in range(3):
            same(gradients(model, example()), expected)
        assert groups.groups_of(model)[0].together() == (("q", "k", "v"),)
    """
    assert forked(setup, hold, child) == (0, "")
