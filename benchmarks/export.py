"""What each export of a trained network weighs, gets right and takes: the tables in benchmarks/README.md.

    python benchmarks/export.py twoconv CHECKPOINT     # a state dict of TwoConvNet trained on Fashion-MNIST
    python benchmarks/export.py albert [--folder F]    # see albert.py; F, if rxnmapper is not installed
    python benchmarks/export.py linear [--layers 8] [--width 2048]    # onnx-nbits beside float, random weights
    python benchmarks/export.py nbits [CHECKPOINT]     # TwoConvNet the same way
    python benchmarks/export.py packed [--width 2048]  # a packed linear layer in torch beside float

Quantized by round to nearest, which needs no data. Accuracy is that of the 10,000 test images, or of the masked tokens
of the 257 test reactions of at most 128 tokens. Latencies are medians of 50 interleaved calls on one thread (ten, if a
call takes half a second); `--latency` leaves the accuracies out, `--batches` says of which sizes.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from albert import load_albert, masked, masked_accuracy

from clipquant.artifact import save_artifact
from clipquant.export import (
    Example,
    Judgement,
    export_onnx,
    export_onnx_int8,
    export_pt2,
    find_example,
)
from clipquant.export import Subject as Exported
from clipquant.export.onnx import Onnx
from clipquant.export.onnx_nbits import OnnxNbits
from clipquant.export.parts.onnx_graph import dequantized_copy
from clipquant.export.parts.sessions import feeds, open_any, runner
from clipquant.export.parts.timing import interleaved_medians
from clipquant.quant.packed.modules import packed_copy
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import FashionMNIST, TwoConvNet

THREADS = 1
BATCHES = (1, 8, 64)
LENGTH = 128  # tokens of a reaction, padding included


@dataclass(frozen=True)
class Subject:
    """A network to export, a call of it, calls that calibrate it, and what a forward is worth."""

    model: torch.nn.Module
    example: Example
    calibration: list[Example]
    accuracy: Callable[[Callable[..., Any]], float]


def twoconv(checkpoint):
    """TwoConvNet, the test images and sixteen batches of training images."""
    model = TwoConvNet().eval()
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    data = FashionMNIST()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    batches = zip(data.train_dataloader(), range(16), strict=False)
    calls = [find_example(model, batch, own=False) for batch, _ in batches]

    def accuracy(forward):
        pairs = zip(images.split(500), labels.split(500), strict=True)
        return float(sum((forward(x).argmax(1) == y).sum() for x, y in pairs)) / len(labels)

    return Subject(model, Example((images[:2],)), calls, accuracy)


def albert(folder):
    """The ALBERT, masked test reactions and sixteen reactions that calibrate, four at a time."""
    model, tokenizer = load_albert(folder)
    inputs = masked("calibration", tokenizer, length=LENGTH)[0][0]
    calls = [Example((), {k: v[i : i + 4] for k, v in inputs.items()}) for i in range(0, 16, 4)]

    def accuracy(forward):
        return masked_accuracy(forward, tokenizer, length=LENGTH)

    return Subject(model, calls[0].resized(2), calls, accuracy)


def write_files(subject, bits, folder, judged):
    """Return (name, bytes, what runs it) of every file; None runs nothing."""
    model, example = subject.model, subject.example
    torch.save(model.state_dict(), folder / "float.pt")
    rows = [("PyTorch, float", (folder / "float.pt").stat().st_size, model)]
    write_float(model, example, folder / "float.onnx")
    size = (folder / "float.onnx").stat().st_size
    rows.append(("ONNX, float", size, open_any(folder / "float.onnx", THREADS)))
    for width in bits:
        weights = quantize_weights(model, Recipe(width, method="rtn"))
        path = save_artifact(weights, folder / f"{width}.safetensors")
        rows.append((f"artifact, {width} bit", path.stat().st_size, None))
        record = export_pt2(model, weights, example, folder / f"{width}.pt2")
        rows.append((f"pt2, {width} bit", record.bytes, torch.export.load(record.path).module()))
        record = export_onnx(model, weights, example, folder / f"{width}.onnx")
        rows.append((f"onnx, {width} bit", record.bytes, open_any(record.path, THREADS)))
        print(f"onnx, {width} bit: difference {record.difference:.1e}", *record.notes, flush=True)
        record = write_nbits(subject, weights, folder / f"{width}.nbits.onnx", judged)
        rows.append((f"onnx-nbits, {width} bit", record.bytes, open_any(record.path, THREADS)))
        print(f"onnx-nbits, {width} bit:", *record.notes, record.latency, flush=True)
    record = write_int8(subject, folder / "int8.onnx", judged)
    print("onnx-int8:", *record.notes, record.latency, flush=True)
    return [*rows, ("onnx-int8", record.bytes, open_any(record.path, THREADS))]


def write_float(model, example, path):
    """Write the float network by the exporter that writes the quantized one, with an open batch."""
    weights = quantize_weights(model, Recipe(8, method="rtn"))
    export_onnx(model, replace_by_floats(weights, model), example, path)


def replace_by_floats(weights, model):
    """Return the weights with nothing quantized."""
    from dataclasses import replace

    state = model.state_dict()
    floats = {name: state[name] for name in weights.tensors} | dict(weights.floats)
    return replace(weights, tensors={}, floats=floats)


def judge_of(subject):
    """Return what judges a file by its accuracy."""
    best = subject.accuracy(subject.model)

    def judge(forward):
        right = subject.accuracy(forward)
        return Judgement(best - right, {"accuracy": right})

    return judge


def write_nbits(subject, weights, path, judged):
    """Write the file whose linear layers compute with the codes; judged as `write_int8`."""
    exported = Exported(
        weights,
        subject.model,
        subject.example,
        subject.calibration,
        judge_of(subject) if judged else None,
    )
    return OnnxNbits(Onnx(), batches=()).write(exported, path)


def write_int8(subject, path, judged):
    """Write the int8 file; judged by its accuracy, or by the distance of its outputs."""
    weights = quantize_weights(subject.model, Recipe(8, method="rtn"))
    return export_onnx_int8(
        subject.model,
        weights,
        subject.example,
        path,
        calibration=subject.calibration,
        judge=judge_of(subject) if judged else None,
    )


def measure(rows, subject, accuracies, batches):
    """Return each file's accuracy and median milliseconds; the two runtimes are timed one after the other."""
    right, medians = {}, {}
    outputs = subject.example.run(subject.model)
    for kind in (torch.nn.Module, ort.InferenceSession):
        own = {name: what for name, _, what in rows if isinstance(what, kind)}
        for name, what in own.items() if accuracies else ():
            forward = runner(what, outputs) if kind is ort.InferenceSession else what
            right[name] = subject.accuracy(forward)
        for batch in batches:
            call = subject.example.resized(batch)
            calls = {name: caller(what, call) for name, what in own.items()}
            for name, ms in interleaved_medians(calls).items():
                medians[name, batch] = ms
    return right, medians


def print_nbits(model, example, bits):
    """Show what `onnx-nbits` takes beside the same network in float, at batch 1, 8 and 64 on one thread."""
    print("| bits | bytes | of float, batch 1 | batch 8 | batch 64 | difference | notes |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width in bits:
            weights = quantize_weights(model, Recipe(width))
            subject = Exported(weights, model, example)
            record = OnnxNbits(Onnx()).write(subject, Path(folder) / f"{width}.onnx")
            ratios = " | ".join(f"{timing.ratio:.2f}" for timing in record.timings)
            said = "; ".join(record.notes)
            print(f"| {width} | {record.bytes:,} | {ratios} | {record.difference:.1e} | {said} |")
    print(f"onnxruntime {ort.__version__}, torch {torch.__version__}, 1 thread")


def linear(layers, width):
    """As many linear layers of random weights, with ReLU between."""
    torch.manual_seed(0)
    parts = [(torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(layers)]
    return torch.nn.Sequential(*(part for pair in parts for part in pair)).eval()


def caller(what, call):
    """Return a function without arguments that runs a module or a session."""
    if isinstance(what, torch.nn.Module):
        return lambda: what(*call.args, **call.kwargs)
    fed = feeds(what, call)
    return lambda: what.run(None, fed)


def print_packed(width, bits, batches):
    """Show what a packed layer takes beside the float one, and the largest difference as a share of the outputs."""
    print(f"| weights | {' | '.join(f'batch {b}' for b in batches)} | difference |")
    print(f"|---|{'---:|' * (len(batches) + 1)}")
    layer = torch.nn.Linear(width, width)
    for count, granularity in [(b, g) for b in bits for g in ("channel", 64)]:
        weights = quantize_weights(layer, Recipe(count, granularity=granularity, method="rtn"))
        packed, plain = packed_copy(layer, weights), dequantized_copy(layer, weights)
        ratios, worst = [], 0.0
        for batch in batches:
            x = torch.randn(batch, width)
            exact = plain(x)
            worst = max(worst, float((packed(x) - exact).abs().max() / exact.abs().max()))
            calls = {"packed": partial(packed, x), "float": partial(layer, x)}
            medians = interleaved_medians(calls)
            ratios.append(f"{medians['packed'] / medians['float']:.2f}")
        per = "a channel" if granularity == "channel" else f"{granularity} weights"
        print(f"| {count} bits, a scale {per} | {' | '.join(ratios)} | {worst:.1e} |", flush=True)


def print_table(rows, right, medians, batches):
    print(f"| file | bytes | accuracy | {' | '.join(f'ms, batch {b}' for b in batches)} |")
    print(f"|---|---:|---:|{'---:|' * len(batches)}")
    for name, size, what in rows:
        figures = [""] * (1 + len(batches))
        if what is not None:
            known = f"{right[name]:.2%}" if name in right else ""
            figures = [known, *(f"{medians[name, batch]:.2f}" for batch in batches)]
        print(f"| {name} | {size:,} | {' | '.join(figures)} |")
    print(f"onnxruntime {ort.__version__}, torch {torch.__version__}, {THREADS} threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    networks = parser.add_subparsers(dest="network", required=True)
    networks.add_parser("twoconv").add_argument("checkpoint")
    networks.add_parser("albert").add_argument("--folder")
    wide, small = networks.add_parser("linear"), networks.add_parser("nbits")
    wide.add_argument("--layers", type=int, default=8)
    wide.add_argument("--width", type=int, default=2048)
    small.add_argument("checkpoint", nargs="?")
    networks.add_parser("packed").add_argument("--width", type=int, default=2048)
    for command in networks.choices.values():
        command.add_argument("--batches", type=int, nargs="+", default=BATCHES)
        command.add_argument("--bits", type=int, nargs="+", default=[8, 4])
        command.add_argument("--latency", action="store_true", help="without the accuracies")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    if args.network == "packed":
        print_packed(args.width, args.bits, args.batches)
        return
    if args.network == "linear":
        model = linear(args.layers, args.width)
        print_nbits(model, Example((torch.randn(2, args.width),)), args.bits)
        return
    if args.network == "nbits":
        model = TwoConvNet().eval()
        if args.checkpoint:
            state = torch.load(args.checkpoint, weights_only=True)
            model.load_state_dict(state.get("state_dict", state))
        print_nbits(model, Example((torch.randn(2, 1, 28, 28),)), args.bits)
        return
    subject = albert(args.folder) if args.network == "albert" else twoconv(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_files(subject, args.bits, Path(folder), not args.latency)
        right, medians = measure(rows, subject, not args.latency, args.batches)
    print_table(rows, right, medians, args.batches)


if __name__ == "__main__":
    main()
