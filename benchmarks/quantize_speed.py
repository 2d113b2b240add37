"""How long quantizing takes: 67 M parameters of Linear at 8 bits per channel, beside the peers of the `bench` extra.

    python benchmarks/quantize_speed.py [--turns 15] [--threads 2]

Four layers of 4096 x 4096, round to nearest. Every turn runs each contender once, in a random order; the peers, which
change the model that they are given, get a copy that is not timed. Medians and ratios of them. The second table is
packing: 16.8 M codes of each width to dense bytes and back.
"""

import argparse
import copy
import logging
import random
import statistics
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from clipquant import quantize
from clipquant.quant.codes.pack import pack, pack_tensor, unpack
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

SIDE, LAYERS = 4096, 4


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]).eval()


def weights_packed(model):
    weights = quantize_weights(model, Recipe(8, method="rtn"))
    return [pack_tensor(tensor) for tensor in weights.tensors.values()]


def with_report(model):
    return quantize(model, 8, method="rtn")


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def by_quanto(model):
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto_quantize

    quanto_quantize(model, weights=qint8)
    freeze(model)


def copying(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def contenders():
    """Return name -> (function of a model, whether it changes the model)."""
    found = {
        "clipquant, codes packed": (weights_packed, False),
        "clipquant `quantize()`, report included": (with_report, False),
    }
    if find_spec("torchao"):
        found[f"torchao {version('torchao')} `Int8WeightOnlyConfig`"] = (by_torchao, True)
    if find_spec("optimum"):
        found[f"optimum-quanto {version('optimum-quanto')} `qint8`"] = (by_quanto, True)
    found["copying the float tensors"] = (copying, False)
    return found


def seconds(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def race(model, turns):
    """Return name -> median milliseconds, every contender run once a turn after one to warm up."""
    entered = contenders()
    times = {name: [] for name in entered}
    order = random.Random(0)
    for turn in range(turns + 1):
        for name, (call, changes) in order.sample(sorted(entered.items()), len(entered)):
            spent = seconds(call, copy.deepcopy(model) if changes else model)
            if turn:
                times[name].append(spent)
    return {name: 1e3 * statistics.median(spent) for name, spent in times.items()}


def print_race(medians):
    peers = {name: ms for name, ms in medians.items() if name.startswith(("torchao", "optimum"))}
    heads = "".join(f" of {name.split()[0]} |" for name in peers)
    print(f"| 67 M parameters, 8 bits per channel | ms |{heads}\n|---|---:|{'---:|' * len(peers)}")
    for name, ms in medians.items():
        ratios = "".join(f" {ms / peer:.2f}x |" for peer in peers.values())
        print(f"| {name} | {ms:.0f} |{ratios}")


def print_packing(turns):
    print("\n| 16.8 M codes | pack, ms | unpack, ms |\n|---|---:|---:|")
    for bits in (8, 4, 3, 2):
        codes = torch.randint(0, 1 << bits, (SIDE * SIDE,), dtype=torch.uint8)
        data = pack(codes, bits)
        there = [seconds(pack, codes, bits) for _ in range(turns)]
        back = [seconds(unpack, data, bits, (SIDE * SIDE,)) for _ in range(turns)]
        medians = [f"{1e3 * statistics.median(spent):.1f}" for spent in (there, back)]
        print(f"| {bits} bits | {' | '.join(medians)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    print_race(race(make_model(), args.turns))
    print_packing(args.turns)
    print(f"\ntorch {torch.__version__}, {args.threads} threads")


if __name__ == "__main__":
    main()
