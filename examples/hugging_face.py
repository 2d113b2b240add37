"""A Hugging Face model inside a LightningModule: 4 bits a weight, embeddings too, and an ONNX file.

    pip install transformers
    python examples/hugging_face.py

The model is a small BERT with random weights, so nothing is downloaded; it learns whether one token stands
somewhere in a sequence. Ends with a file of 54,631 bytes, 6.25 times smaller, that is right on all 512 sequences of
the validation set, as the float model is.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchmetrics import Accuracy
from transformers import BertConfig, BertForSequenceClassification

from clipquant import GradientClipCallback, QuantizeOnFitEnd, load_quantized
from clipquant.clip import Norm

VOCABULARY, LENGTH, SOUGHT = 200, 16, 7


class Classifier(LightningModule):
    """Any model of transformers that takes its batch by name."""

    def __init__(self, config):
        super().__init__()
        self.model = BertForSequenceClassification(config)
        self.accuracy = Accuracy("multiclass", num_classes=2)

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(**batch).logits, batch["labels"])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(count, seed):
    """Return batches as a tokenizer and a collator would make them."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SOUGHT + 1, VOCABULARY, (count, LENGTH), generator=random)
    labels = torch.randint(2, (count,), generator=random)
    places = torch.randint(LENGTH, (count, 1), generator=random)
    tokens[labels == 1] = tokens[labels == 1].scatter(1, places[labels == 1], SOUGHT)
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=32, shuffle=seed == 0)


def main(max_epochs=4, examples=2048, export=("onnx",)):
    """Train, quantize, export; return the report."""
    seed_everything(42)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=LENGTH + 1,
    )  # fmt: skip
    quantizer = QuantizeOnFitEnd(bits=4, monitor="val_acc", export=list(export))
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[GradientClipCallback(Norm(1.0)), quantizer],
    )
    trainer.fit(Classifier(config), batches(examples, seed=0), batches(512, seed=1))
    # The file's names begin with "model.", the attribute that holds the inner model.
    module = load_quantized(quantizer.artifact_path, Classifier(config)).eval()
    print(module(input_ids=torch.zeros(1, LENGTH, dtype=torch.long)).logits)
    return quantizer.report


if __name__ == "__main__":
    main()
