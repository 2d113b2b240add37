"""What does training at 4 and 2 bits cost a small transformer that is trained from scratch?

    python benchmarks/qat_transformer.py FOLDER [--seeds 0 1] [--epochs 60]

FOLDER holds `JapaneseVowels_eq_TRAIN.ts` and `JapaneseVowels_eq_TEST.ts`, as PyPI's `aeon` ships them in
`aeon/datasets/data/JapaneseVowels`: 270 utterances of two vowels by nine speakers to train, 370 to test, 25 frames of
12 coefficients. A row is one whole training, with the accuracy on the test set after its last step; none is picked.
"""

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import GradientClipCallback, QuantizationAwareTraining, QuantizeOnFitEnd

WIDTH, FRAMES, SPEAKERS, PEAK_LR = 64, 25, 9, 2e-3
SETTINGS = {
    "float": None,
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "2 bits, distilled": {"bits": 2, "start": 0.25, "distill": 1.0},
}


class Speaker(pl.LightningModule):
    """Who speaks, by two layers of attention over the frames."""

    def __init__(self):
        super().__init__()
        self.frames = nn.Linear(12, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(FRAMES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SPEAKERS)

    def forward(self, x):
        return self.head(self.encoder(self.frames(x) + self.places).mean(1))

    def training_step(self, batch, _):
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        return nn.functional.cross_entropy(self(noisy), batch[1], label_smoothing=0.1)

    def validation_step(self, batch, _):
        out = self(batch[0])
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(out, batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), PEAK_LR, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def read(path):
    """Return the series (count, frames, coefficients) and the speakers, from 0, of a .ts file."""
    series, speakers = [], []
    lines = iter(Path(path).read_text().splitlines())
    while not next(lines).lower().startswith("@data"):
        pass
    for line in lines:
        *values, speaker = line.split(":")
        series.append([list(map(float, value.split(","))) for value in values])
        speakers.append(int(speaker) - 1)
    return torch.tensor(series).transpose(1, 2), torch.tensor(speakers)


def fitted(setting, seed, train, test, epochs):
    """Return the accuracy after the last step and the bytes of the file."""
    pl.seed_everything(seed, verbose=False)
    net = Speaker()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [GradientClipCallback(1.0, log=False)]
        if setting is not None:
            quantizer = QuantizeOnFitEnd(dirpath=folder, monitor="val_acc", mode="max")
            callbacks += [QuantizationAwareTraining(**setting), quantizer]
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False,
            check_val_every_n_epoch=epochs, num_sanity_val_steps=0, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(net, DataLoader(train, 32, shuffle=True), DataLoader(test, 500))
        if setting is not None:
            return quantizer.report.quantized_metrics["val_acc"], quantizer.report.size_bytes
    size = sum(4 * p.numel() for p in net.parameters())
    return float(trainer.callback_metrics["val_acc"]), size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    names = [args.folder / f"JapaneseVowels_eq_{part}.ts" for part in ("TRAIN", "TEST")]
    (x, y), (u, v) = map(read, names)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    train, test = TensorDataset((x - mean) / std, y), TensorDataset((u - mean) / std, v)
    print("| seed | trained | accuracy | bytes |\n|---:|---|---:|---:|")
    for seed in args.seeds:
        for name, setting in SETTINGS.items():
            accuracy, size = fitted(setting, seed, train, test, args.epochs)
            print(f"| {seed} | {name} | {100 * accuracy:.2f}% | {size:,} |", flush=True)


if __name__ == "__main__":
    main()
