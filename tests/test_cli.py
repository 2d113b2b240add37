import subprocess
import sys

import pytest
import torch
from torch import nn

import clipquant
from clipquant import cli, quantize
from clipquant.cli import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    quantize(net, bits=4, overrides={"0.weight": 8}).save(path)
    return path


@pytest.fixture(params=["rich", "plain"])
def screen(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr("clipquant.report.table.find_spec", lambda name: None)
    return request.param


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_inspect_lists_every_tensor(artifact, screen, capsys):
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    cells = {
        line.replace("│", " ").split()[0]: line.replace("│", " ").split()[1:]
        for line in out.splitlines()
        if line.strip()
    }
    # 36 codes of 8 bits and 4 scales; 640 codes of 4 bits and 10 scales; the scales are float32.
    assert cells["0.weight"] == ["4x1x3x3", "8", str(36 + 4 * 4)]
    assert cells["2.weight"] == ["10x64", "4", str(320 + 10 * 4)]
    assert cells["0.bias"] == ["4", "float32", "16"]
    assert cells["2.bias"] == ["10", "float32", "40"]
    assert f"{artifact.stat().st_size:,} bytes in all" in out
    assert f"clipquant {clipquant.__version__}" in out


def test_inspect_names_tied_weights(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    quantize(net).save(tmp_path / "tied.safetensors")
    assert main(["inspect", str(tmp_path / "tied.safetensors")]) == 0
    assert "tied to 0.weight" in capsys.readouterr().out


def test_verify_says_ok(artifact, capsys):
    assert main(["verify", str(artifact)]) == 0
    assert capsys.readouterr().out == f"{artifact}: ok\n"


def test_verify_says_what_is_damaged(artifact, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(artifact.read_bytes())
    flip_byte(path, -1)
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{path} is damaged" in out
    assert "weight" in out or "bias" in out
    path.write_bytes(artifact.read_bytes()[:-7])
    assert main(["verify", str(path)]) == 1
    assert "damaged" in capsys.readouterr().out


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


def test_inspect_refuses_a_damaged_file(artifact, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(artifact.read_bytes())
    flip_byte(path, len(path.read_bytes()) // 2)
    assert main(["inspect", str(path)]) == 1
    assert "damaged" in capsys.readouterr().err


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


def test_missing_jsonargparse_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("clipquant.cli.trainer.find_spec", lambda name: None)
    assert main(["fit", "--config", "any.yaml"]) == 1
    assert "pip install 'clipquant[cli]'" in capsys.readouterr().err


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


def test_second_clipping_ends_without_a_traceback(tmp_path, capsys):
    config = write_config(tmp_path, class_path="GradientClipCallback", init_args={"rule": 1.0})
    assert main(["fit", "--config", config, "--trainer.gradient_clip_val=1"]) == 1
    assert "gradient_clip_val" in capsys.readouterr().err


def test_traceback_is_shown_where_asked(tmp_path):
    config = write_config(tmp_path, class_path="QuantizeOnFitEnd", init_args={"bits": 9})
    with pytest.raises(ValueError, match="Union subtypes"):
        main(["--traceback", "fit", "--config", config])


def test_wrong_type_in_a_file_is_wrong_usage(tmp_path, capsys):
    config = write_config(tmp_path, class_path="QuantizeOnFitEnd", init_args={"bits": "eight"})
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", config])
    assert stopped.value.code == 2
    assert "bits" in capsys.readouterr().err


def test_errors_of_other_code_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise ValueError("not ours")

    monkeypatch.setattr(torch, "randn", fail)
    config = write_config(tmp_path, class_path="GradientClipCallback", init_args={"rule": 1.0})
    with pytest.raises(ValueError, match="not ours"):
        main(["fit", "--config", config])


def test_every_rule_is_known_by_its_short_name():
    from jsonargparse import ArgumentParser

    import clipquant.clip as clip

    arguments = {
        "Value": {"limit": 0.5},
        "Norm": {"max_norm": 2.0},
        "Chain": {
            "rules": [{"class_path": "AGC"}, {"class_path": "Norm", "init_args": {"max_norm": 1.0}}]
        },
    }
    parser = ArgumentParser()
    parser.add_argument("--rule", type=float | clip.Rule)
    rules = [
        value
        for value in vars(clip).values()
        if isinstance(value, type) and issubclass(value, clip.Rule)
    ]
    for rule in rules:
        if rule is not clip.Rule:
            name = rule.__name__
            parsed = parser.parse_object(
                {"rule": {"class_path": name, "init_args": arguments.get(name, {})}}
            )
            assert isinstance(parser.instantiate_classes(parsed).rule, rule)
