"""`clipquant quantize`: a trained checkpoint gives the file that its fit's end gave."""

import logging
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Trainer

from clipquant import TwoConvNet, load_quantized
from clipquant.cli import main
from clipquant.reference import RandomDigit

CONFIG = """seed_everything: 0
trainer:
  max_steps: 3
  accelerator: cpu
  default_root_dir: {root}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: [{callbacks}]
model: {{class_path: TwoConvNet}}
data: {{class_path: RandomDigit}}
"""


@pytest.fixture
def config(tmp_path):
    def write(callbacks):
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(root=tmp_path, callbacks=callbacks))
        return str(path)

    return write


@contextmanager
def said_by_lightning():
    """Give the lines that Lightning's handlers would print."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.filterwarnings("ignore")
def test_the_file_is_the_one_of_the_fits_end_and_nothing_is_trained(tmp_path, config):
    path = config("{class_path: QuantizeOnFitEnd, init_args: {bits: 8}}")
    assert main(["fit", "--config", path]) == 0
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    with said_by_lightning() as said:
        assert main(["quantize", "--config", path, "--ckpt_path", str(checkpoint)]) == 0
    assert said
    assert not any("reached" in line for line in said)
    first, second = (
        tmp_path / "lightning_logs" / f"version_{run}" / "quantized" / "model.safetensors"
        for run in (0, 1)
    )
    assert first.read_bytes() == second.read_bytes()
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("callbacks", "given", "words"),
    [
        ("{class_path: QuantizeOnFitEnd}", [], "--ckpt_path FILE; got none"),
        (
            "{class_path: QuantizeOnFitEnd}",
            ["--ckpt_path", "none.ckpt"],
            "there is no file 'none.ckpt'",
        ),
        (
            "{class_path: GradientClipCallback}",
            ["--ckpt_path", "none.ckpt"],
            "needs a QuantizeOnFitEnd",
        ),
    ],
)
def test_what_is_missing_is_told_in_one_line(config, capsys, callbacks, given, words):
    assert main(["quantize", "--config", config(callbacks), *given]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_a_fit_in_python_is_taken_too(tmp_path, config):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(TwoConvNet(), RandomDigit(steps=1))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    path = config("{class_path: QuantizeOnFitEnd, init_args: {bits: 8}}")
    assert main(["quantize", "--config", path, "--ckpt_path", str(tmp_path / "own.ckpt")]) == 0
    (made,) = tmp_path.rglob("model.safetensors")
    state = load_quantized(made)
    assert torch.allclose(state["fc2.bias"], trainer.model.fc2.bias)
