"""Names out of files reach a terminal and a page as text, never as what steers them."""

import os
import pty
import subprocess
import sys
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.cli import main
from clipquant.shown import shown, shown_lines

EVIL = "a\x1b]0;owned\x07\x1b[2J\x1b[1;31m\u202egnp\u2066\u200b\u2028\x9b31m[/red][bold]<b>\r\nfake: ok"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self._modules[EVIL] = nn.Linear(4, 4)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    made = quantize(Net(), 4).reported(
        monitor=EVIL, mode="max", calibration=EVIL, environment={EVIL: EVIL}, failures=(EVIL,),
        float_metrics={EVIL: 1.0}, quantized_metrics={EVIL: 0.5},
    )  # fmt: skip
    return made.save(tmp_path / "[red]model\x1b[31m.safetensors")


def is_plain(text):
    return all(
        unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or c == "\n" for c in text
    )


@given(st.text(st.characters()))
def test_what_is_shown_is_seen(text):
    said = shown(text)
    assert is_plain(said)
    assert "\n" not in said
    if text.isprintable():
        assert said == text


def test_text_of_ones_own_keeps_its_lines():
    assert shown_lines("a\nb\x1b[0m") == "a\nb\\x1b[0m"


COMMANDS = (["inspect"], ["verify"], ["report"], ["compare"])


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_text(path, command, rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setattr("clipquant.report.table.find_spec", lambda name: None)
    files = [str(path)] * (2 if command == ["compare"] else 1)
    assert main([*command, *files]) == 0
    said = capsys.readouterr().out
    assert is_plain(said)
    assert "\\x1b" in said


def test_errors_are_text(path, capsys):
    with pytest.raises(ValueError, match="does not fit") as error:
        load_quantized(path, nn.Linear(4, 4))
    assert is_plain(str(error.value))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 1
    assert main(["verify", str(path)]) == 1
    assert main(["inspect", f"{path}\x1b[2J"]) == 1
    captured = capsys.readouterr()
    assert is_plain(captured.out + captured.err)


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal of this kind")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_real_terminal_is_not_steered(path, command):
    """On a terminal rich colours its own tables; of the file's escape sequences none arrives."""
    files = [str(path)] * (2 if command == ["compare"] else 1)
    line = [sys.executable, "-W", "ignore", "-c"]
    line += [
        "import sys; from clipquant.cli import main; sys.exit(main(sys.argv[1:]))",
        *command,
        *files,
    ]
    said = on_terminal(line)
    for sequence in (
        b"\x1b]0;",
        b"\x1b[2J",
        b"\x1b[1;31m\xe2",
        b"\x07",
        "\u202e".encode(),
        b"\x9b",
    ):
        assert sequence not in said.replace("─".encode(), b"")


def on_terminal(line):
    """Run a command whose standard output is a pseudo-terminal; return what it got."""
    master, slave = pty.openpty()
    worker = subprocess.Popen(
        line, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "400"}
    )
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    assert worker.wait() == 0, said
    return said
