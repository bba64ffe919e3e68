"""Tuned tables: what an entry answers for, and files that are not to be trusted."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

from lora_kernels.kernels.tiles import GemmConfig, TmaConfig
from lora_kernels.planning import choose as plan
from lora_kernels.planning import tuned
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.tuned import Entry, Measured, Table, TableError

GPU = "NVIDIA H100 80GB HBM3"
Q = CallShape("fwd", 8192, 4096, 4096, 16, torch.bfloat16)
TILES = TmaConfig(128, 128, 64, num_warps=8, num_stages=4, FLATTEN=True)
TIMES = (Measured("eager", None, 400.0), Measured("tma_extend", TILES, 380.0), Measured("tma_extend", None, 390.0))


def entry(measured: tuple[Measured, ...] = TIMES, **changes: object) -> Entry:
    values: dict[str, object] = {"gpu": GPU, "op": "fwd", "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "r": 16}
    values |= {"dropout": False, "bits": True, "bias": False, "need_dx": True, "measured": measured}
    values |= {"torch": "2.11", "triton": "3.6.0", "driver": "580", "commit": "abc", "date": "2026-11-23"}
    return Entry(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    plan.forget()
    yield
    plan.forget()


def put(text: str, shipped: bool = False) -> None:
    path = tuned.SHIPPED / f"{tuned.slug(GPU)}.json" if shipped else tuned.user_table(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_table_comes_back_as_it_was_written():
    entries = [entry(), entry(op="bwd", M=512, dropout=True), entry((Measured("eager", None, 3.0, 12.5),), r=64)]
    assert tuned.loads(tuned.dumps(GPU, entries), GPU) == entries
    row = json.loads(tuned.dumps(GPU, entries))["entries"][0]
    assert (row["plan"], row["us"], row["tiles"]["kind"]) == ("tma_extend", 380.0, "TmaConfig")
    assert row["tiles"]["fields"]["BLOCK_N"] == 128


def test_eager_stays_unless_another_is_faster_by_two_per_cent():
    assert entry().chosen.tiles == TILES
    slower = (Measured("eager", None, 400.0), Measured("tma_extend", None, 393.0))
    assert entry(slower).chosen.plan == "eager"
    assert entry((slower[0], Measured("tma_extend", None, 391.9))).chosen.plan == "tma_extend"
    host_bound = (Measured("eager", None, 10.0, 12.0), Measured("one_pass", None, 7.0, 40.0))
    assert entry(host_bound).chosen.plan == "eager"
    assert entry().best("tma_extend") == TIMES[1]
    assert entry().best("one_pass") is None


def test_an_entry_answers_for_near_row_counts_and_its_own_key():
    table = Table([entry(), entry(M=512)])
    for M, found in ((8192, 8192), (5000, 8192), (16384, 8192), (4096, 8192), (2048, None), (1024, 512), (512, 512)):
        hit = table.lookup(dataclasses.replace(Q, M=M))
        assert (hit and hit.M) == found, M
    assert table.lookup(dataclasses.replace(Q, M=64)) is None
    assert table.lookup(dataclasses.replace(Q, r=5)) is not None  # ranks up to 16 take the same tile
    for other in ({"r": 17}, {"dropout": True}, {"op": "bwd"}, {"N": 4097}, {"K": 1}, {"dtype": torch.float16}):
        assert table.lookup(dataclasses.replace(Q, **other)) is None
    assert Table([entry(M=512), entry(M=2048)]).lookup(dataclasses.replace(Q, M=1024)).M == 2048


def test_need_dx_and_bits_count_where_they_matter():
    table = Table([entry(), entry(op="bwd"), entry(op="bwd", dropout=True)])
    assert table.lookup(dataclasses.replace(Q, need_dx=False, bits=False)) is not None
    bwd = dataclasses.replace(Q, op="bwd")
    assert table.lookup(dataclasses.replace(bwd, bits=False)) is not None
    assert table.lookup(dataclasses.replace(bwd, need_dx=False)) is None
    assert table.lookup(dataclasses.replace(bwd, dropout=True, bits=False)) is None


def test_the_users_table_lies_over_the_shipped_one():
    faster = (Measured("eager", None, 400.0), Measured("one_pass", None, 100.0))
    put(tuned.dumps(GPU, [entry(), entry(op="bwd")]), shipped=True)
    put(tuned.dumps(GPU, [entry(faster)]))
    table = tuned.table_for(GPU)
    assert table.lookup(Q).chosen.plan == "one_pass"
    assert table.lookup(dataclasses.replace(Q, op="bwd")).chosen.plan == "tma_extend"


def test_an_unknown_gpu_and_a_switch():
    put(tuned.dumps(GPU, [entry()]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.table_for("NVIDIA H300").entries == []
        assert tuned.table_for("").entries == []
        assert len(tuned.table_for(GPU).entries) == 1


def test_switched_off(monkeypatch):
    put(tuned.dumps(GPU, [entry()]))
    monkeypatch.setenv("LORA_KERNELS_TUNED", "0")
    assert tuned.table_for(GPU).entries == []


def changed(**changes: object) -> str:
    return json.dumps(json.loads(tuned.dumps(GPU, [entry()])) | changes)


def with_row(**changes: object) -> str:
    found = json.loads(tuned.dumps(GPU, [entry()]))
    found["entries"][0] |= changes
    return json.dumps(found)


BROKEN = {
    "not JSON": (tuned.dumps(GPU, [entry()])[:-20], "cannot be read"),
    "empty": ("", "cannot be read"),
    "a list": ("[]", "cannot be read"),
    "another version": (changed(format=2), "format is 2"),
    "a rehearsal": (tuned.dumps(GPU, [entry()], rehearsal=True), "rehearsal"),
    "another GPU": (changed(gpu="NVIDIA A100"), "was measured on 'NVIDIA A100'"),
    "a size as text": (with_row(M="8192"), "M is '8192'"),
    "a flag as number": (with_row(dropout=1), "dropout is 1"),
    "a missing field": (changed(entries=[{"op": "fwd"}]), "KeyError"),
    "no eager": (with_row(measured=[{"plan": "one_pass", "tiles": None, "us": 1.0, "host_us": 0.0}]), "eager was not"),
    "no time": (with_row(measured=[{"plan": "eager", "tiles": None, "us": 0.0, "host_us": 0.0}]), "not positive"),
    "NaN": (with_row(measured=[{"plan": "eager", "tiles": None, "us": float("nan"), "host_us": 0.0}]), "not positive"),
    "unknown tiles": (
        with_row(measured=[{"plan": "eager", "tiles": {"kind": "Tiles", "fields": {}}, "us": 1.0, "host_us": 0.0}]),
        "KeyError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_once_and_the_model_decides(name):
    text, why = BROKEN[name]
    put(text)
    with pytest.warns(UserWarning, match="is not used") as caught:
        assert [tuned.table_for(GPU).entries for _ in range(2)] == [[], []]
    assert len(caught) == 1
    assert why in str(caught[0].message)
    assert "lora-kernels tune" in str(caught[0].message)


def test_rehearsals_are_read_only_where_asked_for():
    text = tuned.dumps("rehearsal", [entry()], rehearsal=True)
    assert tuned.loads(text, "rehearsal", rehearsal=True) == [entry()]
    with pytest.raises(TableError, match="figures mean nothing"):
        tuned.loads(text, "rehearsal")


def test_names_of_files(monkeypatch, tmp_path):
    assert tuned.slug(GPU) == "NVIDIA_H100_80GB_HBM3"
    assert tuned.user_table(GPU).parent == tmp_path / "cache" / "tuned"
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.cache_folder() == tmp_path / "xdg" / "lora_kernels" / "tuned"


def test_every_kind_of_tiles_survives():
    for tiles in (None, TILES, GemmConfig(64, 64, 32, num_warps=4, num_stages=2)):
        kept = entry((Measured("eager", None, 5.0), Measured("shrink_extend", tiles, 2.0)))
        assert tuned.loads(tuned.dumps(GPU, [kept]), GPU)[0].measured[1].tiles == tiles
    assert set(tuned.CONFIGS) >= {"GemmConfig", "TmaConfig"}
