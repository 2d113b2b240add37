"""What each export of a trained network weighs, gets right and takes: the table in README's Deploy section.

Usage: python benchmarks/export.py CHECKPOINT, a state dict of TwoConvNet trained on Fashion-MNIST. Latencies are
medians of 50 interleaved calls on one thread.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime as ort
import torch

from clipquant.artifact import save_artifact
from clipquant.export import (
    Example,
    Judgement,
    export_onnx,
    export_onnx_int8,
    export_pt2,
    find_example,
)
from clipquant.export.bench import interleaved_medians
from clipquant.export.onnx import feeds, open_session
from clipquant.export.onnx_int8 import open_session_int8, runner
from clipquant.quant.model import quantize_weights
from clipquant.reference import FashionMNIST, TwoConvNet

THREADS = 1
BATCHES = (1, 32)


def accuracy(forward, images, labels):
    """Share of the test set that a forward gets right."""
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return float(sum((forward(x).argmax(1) == y).sum() for x, y in pairs)) / len(labels)


def load(checkpoint):
    """Return the network, the test set and sixteen calls of the training set."""
    model = TwoConvNet().eval()
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    data = FashionMNIST()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    batches = zip(data.train_dataloader(), range(16), strict=False)
    return model, images, labels, [find_example(model, batch, own=False) for batch, _ in batches]


def write_files(model, images, labels, calibration, bits, folder):
    """Return (name, bytes, what runs it) of every file; None runs nothing."""
    example = Example((images[:2],))
    torch.save(model.state_dict(), folder / "float.pt")
    torch.onnx.export(
        model,
        (images[:2],),
        folder / "float.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )
    rows = [
        ("PyTorch, float", (folder / "float.pt").stat().st_size, model),
        (
            "ONNX, float",
            (folder / "float.onnx").stat().st_size,
            open_session(folder / "float.onnx", THREADS),
        ),
    ]
    for width in bits:
        weights = quantize_weights(model, width, method="rtn")
        path = save_artifact(weights, folder / f"{width}.safetensors")
        rows.append((f"artifact, {width} bit", path.stat().st_size, None))
        record = export_pt2(model, weights, example, folder / f"{width}.pt2")
        rows.append((f"pt2, {width} bit", record.bytes, torch.export.load(record.path).module()))
        record = export_onnx(model, weights, example, folder / f"{width}.onnx")
        rows.append((f"onnx, {width} bit", record.bytes, open_session(record.path, THREADS)))

    def judge(forward):
        right = accuracy(forward, images, labels)
        return Judgement(accuracy(model, images, labels) - right, {"accuracy": right})

    record = export_onnx_int8(
        model,
        quantize_weights(model, 8, method="rtn"),
        example,
        folder / "int8.onnx",
        calibration=calibration,
        judge=judge,
    )
    print("onnx-int8:", *record.notes, record.latency)
    return [*rows, ("onnx-int8", record.bytes, open_session_int8(record.path, THREADS))]


def measure(rows, outputs, images, labels):
    """Return each file's accuracy and median milliseconds; the two runtimes are timed one after the other."""
    right, medians = {}, {}
    for kind in (torch.nn.Module, ort.InferenceSession):
        own = {name: what for name, _, what in rows if isinstance(what, kind)}
        for name, what in own.items():
            forward = runner(what, outputs) if kind is ort.InferenceSession else what
            right[name] = accuracy(forward, images, labels)
        for batch in BATCHES:
            calls = {name: caller(what, images[:batch]) for name, what in own.items()}
            for name, ms in interleaved_medians(calls).items():
                medians[name, batch] = ms
    return right, medians


def caller(what, images):
    """Return a call without arguments that runs a module or a session on images."""
    if isinstance(what, torch.nn.Module):
        return lambda: what(images)
    fed = feeds(what, Example((images,)))
    return lambda: what.run(None, fed)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    model, images, labels, calibration = load(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_files(model, images, labels, calibration, args.bits, Path(folder))
        right, medians = measure(rows, model(images[:2]), images, labels)
    print("| file | bytes | accuracy | ms, batch 1 | ms, batch 32 |\n|---|---:|---:|---:|---:|")
    for name, size, what in rows:
        figures = ["", "", ""]
        if what is not None:
            figures = [f"{right[name]:.2%}", *(f"{medians[name, batch]:.2f}" for batch in BATCHES)]
        print(f"| {name} | {size:,} | {' | '.join(figures)} |")
    print(f"onnxruntime {ort.__version__}, torch {torch.__version__}, {THREADS} threads")


if __name__ == "__main__":
    main()
