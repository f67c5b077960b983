import pytest
from turboquant_cpp.evaluation import default_passage, read_text


def test_packaged_passage_fits_its_purpose():
    passage = default_passage()
    assert 6_000 <= len(passage.encode()) <= 10_000
    assert "\n\n" in passage


def test_default_is_the_passage(tmp_path):
    assert read_text(None) == default_passage()
    (tmp_path / "a.txt").write_text("größer", "utf-8")
    assert read_text(tmp_path / "a.txt") == "größer"


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_text(tmp_path / "empty.txt")
