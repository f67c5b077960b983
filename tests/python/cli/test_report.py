import json

import pytest
import torch
from turboquant_cpp.cli.exit_codes import UserError
from turboquant_cpp.cli.report import environment, read_json, to_json, write_json
from turboquant_cpp.evaluation import CacheSize


def test_numbers_json_does_not_have_become_null():
    report = {"kl": float("nan"), "rows": [(1, float("inf"))], 3: CacheSize({"pages": 1})}
    assert json.loads(to_json(report)) == {
        "kl": None,
        "rows": [[1, None]],
        "3": {"parts": {"pages": 1}},
    }


def test_a_report_names_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    assert environment()["gpus"] == ["GPU 0", "GPU 1"]


def test_reports_come_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"text": "größer"})
    assert read_json(path) == {"text": "größer"}


@pytest.mark.parametrize("content", ["not json", "[1, 2]"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})
