import itertools
import json

import pytest
import torch

from lora_kernels.finetune.data.files import DataError, Examples, LengthBatches, _class_order, read_table, split


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_tsv_and_jsonl_are_read_alike(tmp_path):
    rows = [("good, really", "pos"), ('bad "one"', "neg"), ("fine\u2028now", "pos")]
    quoted = [(text.replace('"', '""'), label) for text, label in rows]
    csv = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in quoted)
    tsv = "label\ttext\n" + "".join(f'{label}\t"{text}"\n' for text, label in quoted)
    jsonl = "".join(json.dumps({"text": text, "label": label}) + "\n\n" for text, label in rows)
    expected = Examples([text for text, _ in rows], [1, 0, 1], ("neg", "pos"))
    assert read_table(write(tmp_path, "a.csv", "\ufeff" + csv)) == expected
    assert read_table(write(tmp_path, "a.tsv", tsv)) == expected
    assert read_table(write(tmp_path, "a.jsonl", jsonl)) == expected


def test_columns_can_be_named_and_numbers_are_ordered(tmp_path):
    path = write(tmp_path, "a.jsonl", "".join(f'{{"s": "text", "stars": {i}}}\n' for i in (10, 9, 1, 10)))
    assert read_table(path, "s", "stars").classes == ("1", "9", "10")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "ending must be one of .csv, .tsv, .jsonl"),
        ("a.csv", "words,label\nx,1\n", r"line 2: no column 'text'; there are \['label', 'words'\]"),
        ("a.csv", "text,label\nx\n", "line 2: 1 cells, and the first line names 2 columns"),
        ("a.csv", "text,label\nfine,1\nhello, world,1\n", "line 3: 3 cells, and the first line names 2 columns"),
        ("a.tsv", "text\tlabel\tnote\na\tb\t1\tx\n", "line 2: 4 cells, and the first line names 3 columns"),
        ("a.csv", 'text,label\n"two\nlines",1\nx,y,1\n', "line 4: 3 cells"),
        ("a.csv", 'text,label\nx,1\n"never closed,0\ny,1\n', "line 3: unexpected end of data"),
        ("a.csv", 'text,label\n"half" quoted,0\n', "line 2: ',' expected after '\"'"),
        ("a.csv", "text,label,label\nx,1,0\n", "the column 'label' occurs twice"),
        ("a.jsonl", '{"text": "x", "label": 1, "label": 0}\n', "line 1: not JSON .a name occurs twice"),
        ("a.csv", "text,label\nx,1\ny,\n", "line 3: the label is empty"),
        ("a.csv", "text,label\n ,1\n", "line 2: the text is empty"),
        ("a.csv", "text,label\nx,1\ny,1\n", "2 rows of 1 classes"),
        ("a.csv", "", "0 rows of 0 classes"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text":', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: a JSON object is expected, not list"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path, name, text))


def test_missing_files_and_other_encodings(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "missing.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="utf-8"):
        read_table(path)


@pytest.mark.parametrize("names", [["nan", "1", "2"], ["NaN", "-nan", "10", "9"], ["b", "a", "nan"]])
def test_a_label_nan_leaves_one_order_of_the_classes(tmp_path, names):
    orders = set()
    for order in itertools.permutations(names):  # a set of strings has another order in each process
        text = "text,label\n" + "".join(f"x,{name}\n" for name in order)
        found = read_table(write(tmp_path, "a.csv", text))
        assert [found.classes[label] for label in found.labels] == list(order)
        orders.add(_class_order(dict.fromkeys(order)))
    assert orders == {tuple(sorted(names))}
    assert _class_order({"inf", "-inf", "3"}) == ("-inf", "3", "inf")


def test_blank_lines_and_quoted_line_breaks_are_rows_of_their_own(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label,,\n"a,\nb",1,,\n\nc,0,,\n')
    assert read_table(path) == Examples(["a,\nb", "c"], [1, 0], ("0", "1"))


def examples(n=200, share=0.3):
    labels = [int(i < share * n) for i in range(n)]
    return Examples([f"text {i}" for i in range(n)], labels, ("a", "b"))


def test_split_is_disjoint_stratified_and_repeatable():
    parts = split(examples(), seed=1)
    texts = [set(part.texts) for part in (parts.train, parts.validation, parts.test)]
    assert [len(t) for t in texts] == [160, 20, 20]
    assert len(set.union(*texts)) == 200
    assert all(sum(part.labels) == 0.3 * len(part) for part in (parts.train, parts.validation, parts.test))
    assert split(examples(), seed=1) == parts != split(examples(), seed=2)


@pytest.mark.parametrize(("n", "held_out"), [(20, 0.1), (200, 0.0), (200, 0.5), (200, -1.0)])
def test_a_split_without_enough_examples_is_refused(n, held_out):
    with pytest.raises(DataError, match="smallest class"):
        split(examples(n), held_out=held_out)


def test_length_batches():
    lengths = [int(i) for i in torch.randint(1, 50, (103,), generator=torch.Generator().manual_seed(0))]
    ordered = LengthBatches(lengths, 8, shuffle=False)
    assert [lengths[i] for batch in ordered for i in batch] == sorted(lengths)
    assert list(ordered) == list(ordered)

    shuffled = LengthBatches(lengths, 8, shuffle=True, chunk=4)
    torch.manual_seed(0)
    first, second = list(shuffled), list(shuffled)
    torch.manual_seed(0)
    assert list(shuffled) == first != second
    assert sorted(i for batch in first for i in batch) == list(range(103))
    assert len(first) == len(shuffled) == 13
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in first) - sum(lengths)
    assert padding < 0.3 * sum(lengths)
