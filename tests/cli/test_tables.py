from lora_kernels.cli.tables import aligned


def test_columns_are_aligned():
    rows = [["name", "n"], ["a", "1,000"]]
    assert aligned(rows, {0}) == "name      n\na     1,000"
    assert aligned(rows) == "name  n\na     1,000"
