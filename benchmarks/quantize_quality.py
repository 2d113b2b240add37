"""Which quantizer keeps how much at which size: this package, method by method, beside the peers of the `bench` extra.

    python benchmarks/quantize_quality.py [CHECKPOINT] [--networks twoconv albert] [--bits 8 6 4 3 2]
        [--who ours peers] [--append FILE.json] [--plot FILE.png]

Two networks, nothing retrained and no label used. `twoconv` is TwoConvNet on the 10,000 test images of Fashion-MNIST;
CHECKPOINT is a state dict of it or a checkpoint of a Trainer, and without one a network is trained on the 60,000
images, seeded, and kept in the user's cache. Its calibration: 1,024 training images. `albert` is the pretrained
transformer of `albert.py`, scored by the masked tokens that it restores, 35 % masked; its calibration: 256 reactions.

`--who` takes `ours`, `peers` or single names. It all takes hours, so `--append` keeps results in a file, and
table and plot show everything in it; `--who none` runs nothing.
"""

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from albert import batches as albert_batches
from albert import load_albert, masked_accuracy
from peers import PEERS, TRANSFORMERS_ONLY, WIDTHS, label, run_peer
from torch import nn

from clipquant import TwoConvNet, quantize
from clipquant.reference import FashionMNIST

METHODS = ("rtn", "mse", "hqq", "gptq", "adaround", "distill")
CALIBRATED = ("gptq", "adaround", "distill")
OURS = [f"clipquant {method}" for method in METHODS]
CALIBRATION_IMAGES = 1024
ROWS = 8  # reactions of a calibration batch, cut to the longest of them
EPOCHS, BATCH, PEAK_LR = 5, 128, 2.5e-3
FLOAT = "float"


@dataclass(frozen=True)
class Network:
    """A float network, its figure of merit from 0 to 1, its calibration inputs and what shares a scale."""

    name: str
    model: nn.Module
    score: Callable[[nn.Module], float]
    calibration: list
    granularity: str | int


@dataclass(frozen=True)
class Result:
    """One row: what `who`, with its version where it is a peer, made of a network. Quality from 0 to 1."""

    network: str
    bits: int
    who: str
    label: str
    size_bytes: int
    quality: float
    seconds: float

    @property
    def key(self):
        return self.network, self.bits, self.who


def twoconv(checkpoint):
    data = FashionMNIST(val_size=0)
    data.prepare_data()
    data.setup("fit")
    net = TwoConvNet().eval()
    state = torch.load(checkpoint or trained(data), map_location="cpu", weights_only=True)
    net.load_state_dict(state.get("state_dict", state))
    test, images = data.test_dataloader(), calibration_images(data.train_dataloader())
    return Network("twoconv", net, lambda model: accuracy(model, test), images, "channel")


@torch.no_grad()
def accuracy(net, loader):
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)


def calibration_images(loader):
    batches, images = [], 0
    torch.manual_seed(0)
    for batch in loader:
        batches.append(batch[0])
        images += len(batch[0])
        if images >= CALIBRATION_IMAGES:
            break
    return batches


def trained(data):
    """Return the file of a TwoConvNet trained on all 60,000 images, from the cache if it is there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "clipquant")
    path = cache / "twoconv-fashion-mnist.pt"
    if path.is_file():
        return path
    torch.manual_seed(0)
    net, loader = TwoConvNet().train(), data.train_dataloader()
    optimizer = torch.optim.AdamW(net.parameters(), PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
        print(f"trained epoch {epoch + 1} of {EPOCHS}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return path


def albert(_checkpoint):
    model, tokenizer = load_albert()
    calibration = [
        cut for batch in albert_batches("calibration", tokenizer) for cut in cut_rows(batch)
    ]
    return Network("albert", model, lambda m: masked_accuracy(m, tokenizer), calibration, 32)


def cut_rows(batch):
    """Return a batch as smaller ones, each as long as its own longest row."""
    found = []
    for start in range(0, len(batch["input_ids"]), ROWS):
        rows = {key: value[start : start + ROWS] for key, value in batch.items()}
        longest = int(rows["attention_mask"].sum(1).max())
        found.append({key: value[:, :longest] for key, value in rows.items()})
    return found


NETWORKS = {"twoconv": twoconv, "albert": albert}


def measure(network, bits, who):
    start = time.perf_counter()
    model, size = made_by(who, network, bits)
    seconds = time.perf_counter() - start
    return Result(network.name, bits, who, label(who), size, network.score(model), seconds)


def made_by(who, network, bits):
    """Return the network quantized, in float32, and the bytes of its file."""
    if who == FLOAT:
        return network.model, sum(t.nbytes for t in unique(network.model.state_dict()))
    if who in PEERS:
        peer = run_peer(who, network.model, bits, network.calibration)
        return peer.model, peer.size_bytes
    method = who.split()[1]
    found = quantize(
        network.model,
        bits,
        method=method,
        granularity=network.granularity,
        data=network.calibration if method in CALIBRATED else None,
        calibration_batches=len(network.calibration),
    )
    with tempfile.TemporaryDirectory() as folder:
        size = found.save(Path(folder, "model.safetensors")).stat().st_size
    return found.apply_to(copy.deepcopy(network.model)), size


def unique(state):
    return {tensor.data_ptr(): tensor for tensor in state.values()}.values()


def has_width(who, network, bits):
    if who not in PEERS:
        return True
    return bits in WIDTHS[who] and (network == "albert" or who not in TRANSFORMERS_ONLY)


def run(args, results):
    """Add what is asked for to `results`, key -> Result, and each to the file at once."""
    for name in args.networks:
        network = NETWORKS[name](args.checkpoint)
        base = measure(network, 32, FLOAT)
        known = results.setdefault(base.key, base)
        if known.quality != base.quality:
            raise SystemExit(
                f"{args.append} holds results of another {name}: its float quality is {known.quality}, this one's "
                f"{base.quality}. Use a new file."
            )
        for bits in args.bits:
            for who in args.who:
                if has_width(who, name, bits):
                    found = measure(network, bits, who)
                    results[found.key] = found
                    keep(args.append, base, found)
                    print(line(found, base), flush=True)


def line(result, base):
    drop = "" if result is base else f"{100 * (base.quality - result.quality):.2f}"
    seconds = "" if result is base else f"{result.seconds:.1f}"
    return (
        f"| {result.network} | {result.bits} | {result.label} | {result.size_bytes:,} | "
        f"{result.quality:.2%} | {drop} | {seconds} |"
    )


def table(results):
    order = [FLOAT, *OURS, *PEERS]
    rows = ["| network | bits | who, method | file, bytes | quality | drop, points | seconds |"]
    rows.append("|---|---:|---|---:|---:|---:|---:|")
    ranked = sorted(
        results.values(),
        key=lambda r: (list(NETWORKS).index(r.network), -r.bits, order.index(r.who)),
    )
    rows += [line(result, results[result.network, 32, FLOAT]) for result in ranked]
    return "\n".join(rows)


def pivot(results, network):
    """Return the network's results in short: a row for each quantizer, a column for each width."""
    mine = {(r.who, r.bits): r for r in results.values() if r.network == network}
    bits = sorted({b for _, b in mine} - {32}, reverse=True)
    base = mine[FLOAT, 32]
    heads = " | ".join(f"{b} bits" for b in bits)
    rows = [
        f"| {network}, float {base.quality:.2%}, {base.size_bytes / 1e3:,.0f} kB | {heads} |",
        f"|---|{'---:|' * len(bits)}",
    ]
    for who in [*OURS, *PEERS]:
        found = [mine.get((who, b)) for b in bits]
        if any(found):
            cells = [f"{r.quality:.2%}, {r.size_bytes / 1e3:,.0f} kB" if r else "" for r in found]
            name = next(r.label for r in found if r)
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def missing(bits):
    """Say which widths the peers do not have."""
    lacking = {who: [str(b) for b in bits if b not in WIDTHS[who]] for who in PEERS}
    said = "; ".join(f"{who} {', '.join(widths)}" for who, widths in lacking.items() if widths)
    only = ", ".join(sorted(TRANSFORMERS_ONLY))
    return f"Widths that a library does not have: {said or 'none'}. Transformers only: {only}."


def keep(path, *found):
    """Add results to the file, which another run may have added to meanwhile."""
    if path:
        rows = kept(path) | {result.key: result for result in found}
        part = Path(f"{path}.part")
        part.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")
        part.replace(path)


def kept(path):
    if not path or not Path(path).exists():
        return {}
    found = [Result(**row) for row in json.loads(Path(path).read_text())]
    return {result.key: result for result in found}


def chosen(names):
    groups = {"ours": OURS, "peers": list(PEERS), "none": []}
    found = [name for given in names for name in groups.get(given, [given])]
    unknown = [name for name in found if name not in [*OURS, *PEERS]]
    if unknown:
        known = ", ".join(map(repr, [*groups, *OURS, *PEERS]))
        raise SystemExit(f"--who takes {known}; got {unknown[0]!r}.")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--who", nargs="+", default=["ours", "peers"])
    parser.add_argument("--append", metavar="FILE.json")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    args.who = chosen(args.who)
    results = kept(args.append)
    if args.who:
        run(args, results)
    results |= kept(args.append)
    print(f"\n{table(results)}")
    for network in [n for n in NETWORKS if (n, 32, FLOAT) in results]:
        print(f"\n{pivot(results, network)}")
    print(f"\n{missing(args.bits)}")
    if args.plot:
        from quality_plot import draw

        draw(results.values(), args.plot)


if __name__ == "__main__":
    main()
