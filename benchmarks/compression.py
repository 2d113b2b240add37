"""How small does training make a network, and at what cost: accuracy against the bytes of the file.

    python benchmarks/compression.py [CHECKPOINT] [--seeds 0 1] [--epochs 2] [--points "2 bits" "97 % ternary"]
        [--precision bf16-mixed] [--append FILE.json] [--plot FILE.png]

TwoConvNet on Fashion-MNIST, all 60,000 images to train and the 10,000 to test. The float network of
`quantize_quality.py` (CHECKPOINT, or trained once and kept) is trained on for a few epochs in one `Trainer.fit`,
with what a point names; the point "float" is trained on as long without. Each file is loaded again and tested in
float32. Peers round the float network that was trained on; `ModelPruning` prunes it, and its float32 file is zipped.
It takes hours, so `--append` keeps results in a file, and table and plot show everything in it; `--points` alone runs
nothing.
"""

import argparse
import copy
import json
import tempfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import lightning.pytorch as pl
import torch
from peers import PEERS, WIDTHS, run_peer
from quantize_quality import accuracy, trained

from clipquant import (
    GradientClipCallback,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    SparsifyWeights,
    TwoConvNet,
    load_quantized,
)
from clipquant.artifact import read_artifact
from clipquant.reference import FashionMNIST
from clipquant.report.layers import stored_bytes

PEAK_LR = 1e-3
FLOAT, ZIPPED = "float", "ModelPruning 90 %, zipped"
CONV1 = {"overrides": {"conv1.weight": 4}}  # 288 of 1.2 million weights, which see the image itself


def pruned(share, **grid):
    """Return the callbacks of a deep compression: pruned in the first half, on a grid from its end on."""
    sparse = SparsifyWeights(share, start=0.0, stop=0.5)
    return lambda: [copy.copy(sparse), QuantizationAwareTraining(**grid, start=0.5, **CONV1)]


def on_grid(**grid):
    return lambda: [QuantizationAwareTraining(**grid, start=0.25)]


TERNARY = {"bits": 2, "levels": 2}
POINTS = {
    "8 bits": on_grid(bits=8),
    "4 bits": on_grid(bits=4),
    "3 bits": on_grid(bits=3),
    "2 bits": on_grid(bits=2),
    "ternary": on_grid(**TERNARY, **CONV1),
    "1 bit": on_grid(bits=1, **CONV1),
    "90 % ternary": pruned(0.9, **TERNARY),
    "97 % ternary": pruned(0.97, **TERNARY),
    "99 % ternary": pruned(0.99, **TERNARY),
    "97 % 4 bits": pruned(0.97, bits=4),
}


@dataclass(frozen=True)
class Result:
    """One point: accuracy on the test images, 0 to 1, and bytes of the file, in an entropy code where it has one."""

    point: str
    seed: int
    accuracy: float
    dense_bytes: int
    size_bytes: int


def fitted(state, seed, callbacks, args):
    """Return the float network, trained on with some callbacks."""
    pl.seed_everything(seed, verbose=False)
    net = TwoConvNet(lr=PEAK_LR, schedule="one_cycle")
    net.load_state_dict(state)
    trainer = pl.Trainer(
        max_epochs=args.epochs, precision=args.precision, accelerator="cpu", logger=False,
        callbacks=[GradientClipCallback(1.0, log=False), *callbacks], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(net, FashionMNIST(val_size=0, seed=seed))
    return net


def measured(point, seed, state, test, args):
    """Return one point of this package's: what its files hold, loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        quantizer = QuantizeOnFitEnd(dirpath=folder, coding="entropy")
        fitted(state, seed, [*POINTS[point](), quantizer], args)
        net = TwoConvNet()
        load_quantized(quantizer.artifact_path, net)
        size = quantizer.artifact_path.stat().st_size
        held = read_artifact(quantizer.artifact_path).weights.tensors.values()
        saved = sum(stored_bytes(replace(t, stream=None)) - stored_bytes(t) for t in held)
    return Result(point, seed, accuracy(net, test), size + saved, size)


def float_network(seed, state, test, args):
    """Return the network trained on as long without anything, kept for what starts from it."""
    path = Path(tempfile.gettempdir(), f"twoconv-float-{seed}-{args.epochs}.pt")
    if not path.is_file():
        torch.save(fitted(state, seed, [], args).state_dict(), path)
    net = TwoConvNet()
    net.load_state_dict(torch.load(path, weights_only=True))
    size = sum(4 * p.numel() for p in net.parameters())
    return net.eval(), Result(FLOAT, seed, accuracy(net, test), size, size)


def zipped(seed, state, test, args):
    """Return Lightning's own pruning, its float32 weights zipped."""
    pruning = pl.callbacks.ModelPruning(
        "l1_unstructured",
        amount=lambda epoch: 0.9 if epoch == 0 else 0.0,
        use_global_unstructured=True,
    )
    net = fitted(state, seed, [pruning], args)
    data = b"".join(p.detach().numpy().tobytes() for p in net.state_dict().values())
    return Result(ZIPPED, seed, accuracy(net, test), len(data), len(zlib.compress(data, 9)))


def peer(point, net, seed, test):
    """Return a peer's rounding of the float network."""
    who, _, bits = point.rpartition(" ")
    made = run_peer(who, net, int(bits), None)
    return Result(point, seed, accuracy(made.model, test), made.size_bytes, made.size_bytes)


def peer_points():
    names = ("optimum-quanto", "torchao")
    return [f"{who} {bits}" for who in names if who in PEERS for bits in WIDTHS[who]]


def run(args, results):
    data = FashionMNIST(val_size=0)
    data.prepare_data()
    data.setup("fit")
    state = torch.load(args.checkpoint or trained(data), map_location="cpu", weights_only=True)
    state, test = state.get("state_dict", state), data.test_dataloader()
    done = {(result.point, result.seed) for result in results}
    for seed in args.seeds:
        for point in args.points:
            if (point, seed) in done:
                continue
            if point == FLOAT:
                found = float_network(seed, state, test, args)[1]
            elif point == ZIPPED:
                found = zipped(seed, state, test, args)
            elif point in POINTS:
                found = measured(point, seed, state, test, args)
            else:
                found = peer(point, float_network(seed, state, test, args)[0], seed, test)
            results.append(found)
            print(found, flush=True)
            if args.append:
                Path(args.append).write_text(json.dumps([asdict(r) for r in results], indent=1))


def table(results):
    """Print each point's mean over seeds, its drop from the float network trained as long, and how much smaller."""
    floats = {r.seed: r for r in results if r.point == FLOAT}
    print("| point | seeds | accuracy | drop | dense kB | kB | times smaller |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for point in dict.fromkeys(r.point for r in results):
        rows = [r for r in results if r.point == point]
        drops = [100 * (floats[r.seed].accuracy - r.accuracy) for r in rows if r.seed in floats]
        drop = f"{mean(drops):.2f}" if drops else ""
        size = mean(r.size_bytes for r in rows)
        ratio = next(iter(floats.values())).size_bytes / size if floats else float("nan")
        print(
            f"| {point} | {len(rows)} | {100 * mean(r.accuracy for r in rows):.2f}% | {drop} | "
            f"{mean(r.dense_bytes for r in rows) / 1e3:,.1f} | {size / 1e3:,.1f} | {ratio:.1f} |"
        )


def draw(results, path):
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for result in results:
        ours = result.point in POINTS
        color = "#c0392b" if ours else "#1f77b4"
        place = (result.size_bytes / 1e3, 100 * result.accuracy)
        panel.plot(*place, "o" if ours else "s", color=color, markersize=5)
        panel.annotate(result.point, place, (5, 3), textcoords="offset points", fontsize=7)
    panel.set_xscale("log")
    panel.set_xlabel("bytes of the file, kB")
    panel.set_ylabel("accuracy on the test images, %")
    panel.set_title("TwoConvNet on Fashion-MNIST, trained on for a few epochs")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    every = [FLOAT, *POINTS, ZIPPED, *peer_points()]
    parser.add_argument("--points", nargs="*", default=every, choices=every, metavar="POINT")
    parser.add_argument("--append")
    parser.add_argument("--plot")
    args = parser.parse_args()
    results = []
    if args.append and Path(args.append).is_file():
        results = [Result(**row) for row in json.loads(Path(args.append).read_text())]
    run(args, results)
    table(results)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
