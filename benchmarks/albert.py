"""A pretrained transformer for the benchmarks: the ALBERT of PyPI's rxnmapper, a masked language model of reactions.

0.7 M parameters: one layer run twelve times, the decoder tied to the embedding. The model comes from the package,
installed without its dependencies (`pip install --no-deps rxnmapper==0.4.3`) or unpacked anywhere; transformers loads
it. Its figure of merit is the share of masked tokens that it restores, on 300 reactions of `reactions.txt`.

    python benchmarks/albert.py

prints that figure of the float model, for 15 % and for 35 % of the tokens masked.
"""

import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

REACTIONS = Path(__file__).with_name("reactions.txt")
RATES = (0.15, 0.35)  # shares of the tokens that are masked
IGNORED = -100  # label of a token that was not masked
SEEDS = {"test": 8, "calibration": 7}
SIZES = {"test": 50, "calibration": 32}  # reactions of a batch

_TOKEN = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)


@dataclass(frozen=True)
class Tokenizer:
    """Reaction SMILES to token numbers, one atom, bond or bracket each."""

    vocabulary: dict

    def encode(self, reaction):
        tokens = _TOKEN.findall(reaction)
        if "".join(tokens) != reaction:
            raise ValueError(f"not a reaction SMILES: {reaction!r}.")
        unknown = self.vocabulary["[UNK]"]
        inner = [self.vocabulary.get(token, unknown) for token in tokens]
        return [self.vocabulary["[CLS]"], *inner, self.vocabulary["[SEP]"]]


def load_albert(folder=None):
    """Return the float model in eval mode and its tokenizer; `folder` stands for rxnmapper's own."""
    from transformers import AlbertForMaskedLM

    folder = Path(folder) if folder else _packaged()
    words = (folder / "vocab.txt").read_text().splitlines()
    tokenizer = Tokenizer({word: number for number, word in enumerate(words) if word})
    return AlbertForMaskedLM.from_pretrained(folder).eval(), tokenizer


def _packaged():
    found = find_spec("rxnmapper")  # not imported: it would ask for its dependencies
    if found is None:
        raise SystemExit("rxnmapper is missing: pip install --no-deps rxnmapper==0.4.3")
    return next(Path(found.origin).parent.glob("models/transformers/albert*"))


def reactions(split):
    """Return the reactions of "test" (300, the shortest first) or "calibration" (256)."""
    text = REACTIONS.read_text().split(f"# {split}\n")[1].split("# ")[0]
    lines = text.splitlines()
    return sorted(lines, key=len) if split == "test" else lines


def masked(split, tokenizer, rate=0.35, length=None):
    """Return (inputs, labels) of each batch, `rate` of the tokens masked at random, always the same ones.

    Inputs are the keywords `input_ids` and `attention_mask`; labels are the tokens masked, `IGNORED` elsewhere.
    Batches are as long as their longest reaction, or padded to `length`, longer reactions left out.
    """
    draw = random.Random(SEEDS[split])
    rows = [tokenizer.encode(reaction) for reaction in reactions(split)]
    rows = [row for row in rows if length is None or len(row) <= length]
    size = SIZES[split]
    return [
        _batch(rows[i : i + size], tokenizer.vocabulary["[MASK]"], rate, draw, length)
        for i in range(0, len(rows), size)
    ]


def _batch(rows, mask, rate, draw, length):
    ids = torch.zeros(len(rows), length or max(map(len, rows)), dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.tensor(row)
        attention[r, : len(row)] = 1
        for c in range(1, len(row) - 1):
            if draw.random() < rate:
                labels[r, c], ids[r, c] = row[c], mask
    return {"input_ids": ids, "attention_mask": attention}, labels


def batches(split, tokenizer, rate=0.35):
    """Return the inputs alone: what calibrates a quantizer."""
    return [inputs for inputs, _ in masked(split, tokenizer, rate)]


@torch.no_grad()
def masked_accuracy(forward, tokenizer, rate=0.35, split="test", length=None):
    """Return the share of masked tokens that `forward(**inputs)`, a model or an exported one, restores."""
    right = count = 0
    for inputs, labels in masked(split, tokenizer, rate, length):
        outputs = forward(**inputs)
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
        kept = labels != IGNORED
        right += int((logits.argmax(-1)[kept] == labels[kept]).sum())
        count += int(kept.sum())
    return right / count


def main():
    model, tokenizer = load_albert()
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{size:,} bytes of float parameters")
    for rate in RATES:
        print(f"{rate:.0%} masked: {masked_accuracy(model, tokenizer, rate):.4f}")


if __name__ == "__main__":
    main()
