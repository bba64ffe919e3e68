import pytest

from lora_kernels.finetune.data.files import DataError
from lora_kernels.finetune.data.pairs import Pairs, read_pairs, split_pairs


def test_pairs_are_read(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("en\tde\none\teins\n two \tzwei\n")
    assert read_pairs(path, "en", "de") == Pairs(["one", "two"], ["eins", "zwei"])
    for text, message in (("en\tde\na\t\n", "line 2: the target is empty"), ("en\tfr\na\tb\n", "no column 'de'")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_pairs(path, "en", "de")


def test_no_source_is_in_two_parts():
    pairs = Pairs([f"s{i % 40}" for i in range(100)], [f"t{i}" for i in range(100)])
    parts = split_pairs(pairs, seed=1, held_out=0.2)
    sources = [set(part.sources) for part in (parts.train, parts.validation, parts.test)]
    assert [len(part) for part in sources] == [24, 8, 8]
    assert len(set.union(*sources)) == 40
    together = [pair for part in (parts.train, parts.validation, parts.test)
                for pair in zip(part.sources, part.targets, strict=True)]  # fmt: skip
    assert sorted(together) == sorted(zip(pairs.sources, pairs.targets, strict=True))
    assert split_pairs(pairs, seed=1, held_out=0.2) == parts != split_pairs(pairs, seed=2, held_out=0.2)
    assert parts.train.sources != sorted(parts.train.sources, key=pairs.sources.index)


@pytest.mark.parametrize(("count", "share"), [(9, 0.1), (10, 0.5), (10, 0.0)])
def test_parts_that_would_be_empty_are_refused(count, share):
    with pytest.raises(DataError, match="the share must be between"):
        split_pairs(Pairs(["x" * i for i in range(count)], ["y"] * count), 0, share)
