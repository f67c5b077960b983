import pytest
from turboquant_cpp.cli import main
from turboquant_cpp.cli.exit_codes import UserError
from turboquant_cpp.cli.plots import draw, save
from turboquant_cpp.cli.report import write_json

REPORT = {
    "model": "a model",
    "caches": [
        {"label": "exact", "cache_bytes": 8 << 20, "tokens_per_s": 10.0},
        {
            "label": "4+4",
            "cache_bytes": 2 << 20,
            "cache_bytes_by_part": {"exact": 1 << 20, "pages": 1 << 20},
            "tokens_per_s": 9.0,
            "kl": 0.0015,
            "top1_agreement": 0.98,
            "kl_along_window": [0.0, 0.001, 0.002],
        },
        {"label": "2+2", "cache_bytes": 1 << 20, "kl": None, "tokens_per_s": None},
    ],
}


def test_one_panel_per_figure_that_is_there():
    assert len(draw(REPORT).axes) == 5
    only_size = {"caches": [{"label": "4+4", "cache_bytes": 1}]}
    assert len(draw(only_size).axes) == 1


def test_missing_figures_leave_a_row_out():
    axes = {axis.get_title("left"): axis for axis in draw(REPORT).axes}
    labels = [tick.get_text() for tick in axes["KL divergence, nats per token"].get_yticklabels()]
    assert labels == ["4+4"]


@pytest.mark.parametrize("report", [{}, {"caches": []}, {"caches": [{"kl": 1}]}, {"caches": 3}])
def test_other_reports_are_refused(report):
    with pytest.raises(UserError, match="caches"):
        draw(report)


def test_same_report_gives_the_same_svg(tmp_path):
    png, svg = save(draw(REPORT), tmp_path / "out" / "a")
    assert png.read_bytes().startswith(b"\x89PNG")
    _, again = save(draw(REPORT), tmp_path / "b")
    assert svg.read_text() == again.read_text()


def test_command_writes_beside_the_report(tmp_path, capsys):
    write_json(tmp_path / "demo.json", REPORT)
    assert main(["plot", str(tmp_path / "demo.json")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "demo.png", "demo.svg"}
    assert "demo.svg" in capsys.readouterr().out
