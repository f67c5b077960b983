import pytest
from turboquant_cpp.cli import main
from turboquant_cpp.cli.exit_codes import USER_ERROR


def code_of(*arguments):
    """Exit code, whether returned or raised as argparse does."""
    try:
        return main(list(arguments))
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    "command", ["demo", "generate", "benchmark", "eval", "verify", "plot", "info"]
)
def test_every_command_has_help(command, capsys):
    assert code_of(command, "--help") == 0
    assert "usage: turboquant-cpp " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["generate"],
        ["demo", "--widths", "four"],
        ["verify", "--length", "0"],
        ["benchmark", "--max-new-tokens", "-1"],
        ["generate", "hello", "--attention", "magic"],
    ],
)
def test_wrong_arguments_exit_with_argparse_s_message(arguments, capsys):
    assert code_of(*arguments) == USER_ERROR
    assert "usage: turboquant-cpp" in capsys.readouterr().err


def test_benchmark_keeps_the_original_flags(capsys):
    code_of("benchmark", "--help")
    text = capsys.readouterr().out
    flags = "--model --prompt --video --bits --compressed --max-new-tokens --output"
    assert all(flag in text for flag in flags.split())


def test_video_needs_a_model(capsys):
    assert code_of("benchmark", "--video", "a.mp4") == USER_ERROR
    assert "--model" in capsys.readouterr().err


def test_missing_report_is_named(tmp_path, capsys):
    assert code_of("plot", str(tmp_path / "missing.json")) == USER_ERROR
    assert "missing.json" in capsys.readouterr().err
