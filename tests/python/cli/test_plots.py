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


def panel(report, title):
    return next(axes for axes in draw(report).axes if axes.get_title("left") == title)


def test_divergence_against_size_has_a_line_per_family():
    rows = [
        {"label": "2+2", "kl": 0.03, "bytes_per_token": 7168, "kl_interval": [0.02, 0.04]},
        {"label": "4+4", "kl": 0.0015, "bytes_per_token": 13312, "kl_interval": None},
        {"label": "fp8", "kl": 0.006, "bytes_per_token": 11264, "backend": "fp8"},
    ]
    axes = panel({"caches": rows}, "KL divergence against size")
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["TurboQuant", "fp8"]
    lines = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert lines == [[[7, 0.03], [13, 0.0015]], [[11, 0.006]]]
    assert {text.get_text() for text in axes.texts} == {"2+2", "4+4", "fp8"}


def test_a_cache_without_divergence_leaves_the_log_scale_alone():
    rows = [{"label": label, "kl": kl, "bytes_per_token": 1} for label, kl in (("a", 0), ("b", 1))]
    axes = panel({"caches": rows}, "KL divergence against size")
    assert [text.get_text() for text in axes.texts] == ["b"]


NEEDLES = {
    "kind": "needle",
    "caches": [
        {
            "label": label,
            "cells": [
                {"length": length, "depth": depth, "log_probability": value, "retrieved": 0.5}
                for length in (512, 1024)
                for depth in (0.0, 0.5, 1.0)
            ],
        }
        for label, value in (("exact", -0.1), ("2+2", -5.0), ("broken", None))
    ],
}


def test_needles_become_heat_maps():
    *panels, bar = draw(NEEDLES).axes
    assert [axes.get_title("left") for axes in panels] == ["exact", "2+2", "broken"]
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["512", "1,024"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["0 %", "50 %", "100 %"]
    assert panels[1].images[0].get_array().shape == (3, 2)
    assert (panels[1].images[0].get_array() == -5.0).all()
    assert len(panels[1].texts) == 6
    assert not panels[2].texts
    assert "nats" in bar.get_ylabel()


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
