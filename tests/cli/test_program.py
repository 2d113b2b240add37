"""The program: its help, its exit codes, and which errors are told in one line."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import clipquant
from clipquant import cli, quantize
from clipquant.cli import main
from clipquant.errors import ArgumentError, PlaceError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    quantize(net, bits=4, overrides={"0.weight": 8}).save(path)
    return path


# export asks for a model first, compare for a second file; their own tests cover them.
@pytest.mark.parametrize("command", sorted({*cli.COMMANDS} - {"compare", "export"}))
def test_missing_and_damaged_files_end_without_a_traceback(command, artifact, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(artifact.read_bytes()[:100])
    for path in (tmp_path / "none.safetensors", tmp_path, broken):
        assert main([command, str(path)]) == 1
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert path.name in said
        assert "Traceback" not in said


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", *cli.COMMANDS):
        assert name in out


def test_unknown_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_version_and_help_do_not_wait_for_torch():
    code = (
        "import sys; from clipquant.cli import build_parser, main; build_parser().format_help()\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"clipquant {clipquant.__version__}\n"


@pytest.fixture
def failing(monkeypatch):
    """Let a command raise an error."""

    def fail_with(error):
        def run(args):
            raise error

        monkeypatch.setitem(
            cli.COMMANDS, "inspect", cli.Command("", cli.COMMANDS["inspect"].add_arguments, run)
        )

    return fail_with


@pytest.mark.parametrize("error", [ArgumentError("bits: 9"), PlaceError(28, "disk: full")])
def test_an_error_of_the_package_is_one_line(error, failing, capsys):
    failing(error)
    assert main(["inspect", "a"]) == 1
    assert capsys.readouterr().err == f"clipquant: error: {error}\n"
    with pytest.raises(type(error)):
        main(["--traceback", "inspect", "a"])


@pytest.mark.parametrize("kind", [TypeError, ValueError, AttributeError, KeyError, RuntimeError])
def test_a_fault_of_the_program_keeps_its_traceback(kind, failing):
    failing(kind("internal"))
    with pytest.raises(kind, match="internal"):
        main(["inspect", "a"])


def test_the_cause_that_has_words_for_the_user_is_told(failing, capsys):
    error = ValueError("Parser key 'bits': does not validate")
    error.__cause__ = ArgumentError("bits must be 1 to 8; got 9.")
    failing(error)
    assert main(["inspect", "a"]) == 1
    assert capsys.readouterr().err == "clipquant: error: bits must be 1 to 8; got 9.\n"


def test_a_fault_inside_the_package_is_not_taken_for_the_users(artifact, monkeypatch):
    """A TypeError raised in a function of the package itself, with a real command above it."""
    monkeypatch.setattr("clipquant.report.layers.stored_bytes", lambda: 0)
    with pytest.raises(TypeError):
        main(["inspect", str(artifact)])


@pytest.mark.parametrize("command", sorted({*cli.COMMANDS}))
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{cli.COMMANDS[command].help[1:]}. " in said
    assert f"For example: clipquant {command} {cli.COMMANDS[command].example}" in said
    if command == "export":
        assert "pt2, onnx, onnx-int8, onnx-nbits, compressed-tensors" in said
