"""Lightning's own commands: short names, wrong settings, a missing package."""

import sys
from pathlib import Path

import pytest
import torch

from clipquant.cli import main


def write_config(tmp_path, **callback):
    settings = "".join(
        f"        {name}: {value}\n" for name, value in callback["init_args"].items()
    )
    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  max_steps: 1\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n"
        f"  default_root_dir: {tmp_path}\n  callbacks:\n    - class_path: {callback['class_path']}\n"
        f"      init_args:\n{settings}"
        "model:\n  class_path: TwoConvNet\ndata:\n  class_path: RandomDigit\n"
    )
    return str(path)


def test_missing_jsonargparse_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("clipquant.cli.trainer.find_spec", lambda name: None)
    assert main(["fit", "--config", "any.yaml"]) == 1
    assert "pip install 'clipquant[cli]'" in capsys.readouterr().err


def test_second_clipping_ends_without_a_traceback(tmp_path, capsys):
    config = write_config(tmp_path, class_path="GradientClipCallback", init_args={"rule": 1.0})
    assert main(["fit", "--config", config, "--trainer.gradient_clip_val=1"]) == 1
    assert "gradient_clip_val" in capsys.readouterr().err


def test_wrong_type_in_a_file_is_wrong_usage(tmp_path, capsys):
    config = write_config(tmp_path, class_path="QuantizeOnFitEnd", init_args={"bits": "eight"})
    assert main(["fit", "--config", config]) == 2
    error = capsys.readouterr().err
    assert "QuantizeOnFitEnd: bits must be int or 'auto'; got eight." in error


def test_every_rule_is_known_by_its_short_name():
    from jsonargparse import ArgumentParser

    import clipquant.clip as clip

    value = {"class_path": "Value", "init_args": {"limit": 0.5}}
    arguments = {"Value": {"limit": 0.5}, "Norm": {"max_norm": 2.0}, "Chain": {"rules": [value]}}
    parser = ArgumentParser()
    parser.add_argument("--rule", type=float | clip.Rule)
    rules = [
        known
        for known in vars(clip).values()
        if isinstance(known, type) and issubclass(known, clip.Rule)
    ]
    for rule in rules:
        if rule is not clip.Rule:
            name = rule.__name__
            parsed = parser.parse_object(
                {"rule": {"class_path": name, "init_args": arguments.get(name, {})}}
            )
            assert isinstance(parser.instantiate_classes(parsed).rule, rule)


@pytest.mark.parametrize(
    ("class_path", "init_args", "words"),
    [
        ("QuantizeOnFitEnd", {"bits": 9}, "bits must be a whole number from 1 to 8; got 9"),
        ("QuantizeOnFitEnd", {"max_drop": 0.1}, "bits='auto'"),
        ("QuantizeOnFitEnd", {"exclude": "['*.wight']"}, "*.wight"),
        ("GradientClipCallback", {"rule": -1.0}, "-1.0"),
        ("GradientClipCallback", {"include": "['conv9.*']"}, "conv9.*"),
    ],
)
def test_wrong_settings_end_without_a_traceback(tmp_path, capsys, class_path, init_args, words):
    config = write_config(tmp_path, class_path=class_path, init_args=init_args)
    assert main(["fit", "--config", config]) == 1
    error = capsys.readouterr().err
    assert "clipquant: error: " in error
    assert words in error
    assert "Traceback" not in error


def test_traceback_is_shown_where_asked(tmp_path):
    config = write_config(tmp_path, class_path="QuantizeOnFitEnd", init_args={"bits": 9})
    with pytest.raises(ValueError, match="Union subtypes"):
        main(["--traceback", "fit", "--config", config])


def test_errors_of_other_code_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise ValueError("not ours")

    monkeypatch.setattr(torch, "randn", fail)
    config = write_config(tmp_path, class_path="GradientClipCallback", init_args={"rule": 1.0})
    with pytest.raises(ValueError, match="not ours"):
        main(["fit", "--config", config])


def test_a_class_of_a_file_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_of_the_folder.py").write_text(
        "from clipquant import TwoConvNet\nclass Own(TwoConvNet):\n    pass\n"
    )
    config = Path(write_config(tmp_path, class_path="QuantizeOnFitEnd", init_args={"bits": 8}))
    config.write_text(
        config.read_text().replace("class_path: TwoConvNet", "class_path: own_of_the_folder.Own")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert main(["fit", "--config", str(config)]) == 0
    assert (tmp_path / "quantized" / "model.safetensors").is_file()
