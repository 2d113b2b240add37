"""Mistakes in a configuration: one line that names the class, the option, the value and the closest name."""

import pytest

from clipquant.cli import main
from clipquant.cli.mistakes import told

CONFIG = """trainer:
  max_steps: 1
  callbacks:
    - class_path: {callback}
      init_args:
        {arguments}
model:
  class_path: {model}
data:
  class_path: RandomDigit
{more}"""


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"arguments": "nbits: 4"}, "QuantizeOnFitEnd has no option 'nbits'. Did you mean 'bits'?"),
        ({"arguments": "bits: four"}, "QuantizeOnFitEnd: bits must be int or 'auto'; got four."),
        (
            {"arguments": "weights: lst"},
            "QuantizeOnFitEnd: weights must be 'last' or 'best'; got lst.",
        ),
        (
            {"callback": "QuantizeOnFitend"},
            "trainer.callbacks: no class is named 'QuantizeOnFitend'. Did you mean 'QuantizeOnFitEnd'?",
        ),
        (
            {
                "callback": "GradientClipCallback",
                "arguments": "rule: {class_path: Norm, init_args: {max_nrm: 1.0}}",
            },
            "Norm has no option 'max_nrm'. Did you mean 'max_norm'?",
        ),
        (
            {"callback": "GradientClipCallback", "arguments": "rule: {class_path: Nrm}"},
            "rule: no class is named 'Nrm'. Did you mean 'Norm'?",
        ),
        (
            {"model": "TwoConvNett"},
            "model: no class is named 'TwoConvNett'. Did you mean 'TwoConvNet'?",
        ),
        (
            {"model": "no_such_file.Net"},
            "model: no module is named 'no_such_file'. Run where no_such_file.py lies, or set PYTHONPATH.",
        ),
        (
            {"model": "clipquant.reference.TwoConv"},
            "model: clipquant.reference has no 'TwoConv'. Did you mean 'TwoConvNet'?",
        ),
        (
            {"callback": "GradientClipCallback", "arguments": "max_norm: 1.0"},
            "GradientClipCallback has no option 'max_norm'. What clips is its option rule: Norm(...).",
        ),
        (
            {"arguments": "group_size: 64"},
            "QuantizeOnFitEnd has no option 'group_size'. Did you mean 'granularity'?",
        ),
        (
            {"arguments": "export: onnx"},
            "QuantizeOnFitEnd: export must be list[str | Format] or null; got onnx. Write [onnx].",
        ),
        (
            {"arguments": "include: fc*"},
            "QuantizeOnFitEnd: include must be list[str] or null; got fc*. Write [fc*].",
        ),
        (
            {"more": "", "arguments": "bits: 8\n      max_drop: 0.1"},
            "QuantizeOnFitEnd: max_drop must stand below init_args; got it beside. Indent it further.",
        ),
        ({"more": "seed: 3\n"}, "fit has no option 'seed'. Did you mean 'seed_everything'?"),
        ({"more": "optimiser: 3\n"}, "fit has no option 'optimiser'. Did you mean 'optimizer'?"),
    ],
)
def test_a_mistake_is_one_line_with_the_closest_name(tmp_path, capsys, changed, line):
    given = {
        "callback": "QuantizeOnFitEnd",
        "arguments": "bits: 8",
        "model": "TwoConvNet",
        "more": "",
    }
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(**(given | changed)))
    assert main(["fit", "--config", str(path)]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [f"clipquant: error: {line}"]


def test_a_trainers_option_is_compared_with_the_trainers(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {max_stps: 1}\nmodel: {class_path: TwoConvNet}\n")
    assert main(["fit", "--config", str(path)]) == 2
    assert (
        "fit has no option 'trainer.max_stps'. Did you mean 'max_steps'?" in capsys.readouterr().err
    )


@pytest.mark.parametrize("text", [None, "trainer: [1\nmodel: {", ""])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["fit", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) < 300
    assert text is not None or f"there is no file '{path}'" in lines[0]


def test_what_is_not_known_keeps_its_own_deepest_line():
    message = "Outer thing went wrong\n" + "x" * 300 + "\n    the cause itself"
    assert told(message) == "the cause itself"
    assert told("short\nmessage") == "short message"


def test_what_the_trainer_refuses_and_what_is_missing_are_one_line(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {accelerator: gpuu}\nmodel: {class_path: TwoConvNet}\n")
    assert main(["fit", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert "error: the Trainer refuses its options: " in said
    assert "gpuu" in said
    assert "Traceback" not in said
    assert main(["fit"]) == 2
    assert "model is missing: pass a configuration that names it" in capsys.readouterr().err
