"""Other libraries' quantizers as their own users call them, each at one width, with the file that it would write.

A peer is a function of (float model, bits, calibration inputs) that returns what it made of a copy of the model as a
`Peer`: the float32 weights that its codes stand for, and the bytes of its file, which is really written. Scoring the
dequantized weights gives every library the same arithmetic. What a peer leaves in float, such as embeddings, stays in
its file in float. `WIDTHS` says which codes each has. Settings are the better ones of those that a library offers at
that width, tried on both networks of `quantize_quality.py`; groups are of 64 wherever it lets one say so.
"""

import copy
import json
import logging
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

GROUP = 64
TUNED = 200  # steps for which auto-round learns a layer's rounding: its default


@dataclass(frozen=True)
class Peer:
    """A quantized copy: a plain float module that holds the dequantized weights, and the bytes of its file."""

    model: nn.Module
    size_bytes: int


def quantized_linears(model):
    """Return the names of the Linear layers to quantize.

    Not one whose weight is an embedding too: quantized, it would stand in the file a second time, so the libraries'
    integrations into transformers leave it out as well.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings
    ]


def by_quanto(model, bits, _calibration):
    from optimum.quanto import (
        HqqOptimizer,
        freeze,
        qint2,
        qint4,
        qint8,
        quantization_map,
        quantize,
    )

    guest = copy.deepcopy(model)
    linears = quantized_linears(model)
    tied = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in linears]
    optimizer = HqqOptimizer() if bits < 8 else None  # its default loses far more below 8 bits
    quantize(guest, weights={8: qint8, 4: qint4, 2: qint2}[bits], optimizer=optimizer, exclude=tied)
    freeze(guest)
    size = written(guest.state_dict(), quantization_map(guest))
    names = [n for n, m in guest.named_modules() if hasattr(m, "weight_qtype")]
    return Peer(with_weights(model, {n: guest.get_submodule(n).weight for n in names}), size)


def by_torchao(model, bits, _calibration):
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    guest = copy.deepcopy(model)
    linears = quantized_linears(model)
    # At 2 bits its search for a scale keeps more, which takes a symmetric grid; above, the affine one does.
    searched = bits == 2
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(GROUP),
        mapping_type=MappingType.SYMMETRIC if searched else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm="hqq_scale_only" if searched else "affine",
    )
    quantize_(guest, config, filter_fn=lambda _module, name: name in linears)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch.save(guest.state_dict(), path)
        size = path.stat().st_size
    return Peer(with_weights(model, {n: guest.get_submodule(n).weight for n in linears}), size)


def by_hqq(model, bits, _calibration, axis):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    guest = copy.deepcopy(model)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    weights = {}
    for name in quantized_linears(model):
        # Its default, half precision, is that of the scales in its file.
        layer = HQQLinear(guest.get_submodule(name), config, torch.float16, device="cpu")
        guest.set_submodule(name, layer)
        weights[name] = layer.dequantize()
    return Peer(with_weights(model, weights), written(guest.state_dict()))


def by_auto_round(model, bits, calibration):
    """Tune and round the model's transformer blocks; what stands outside of them stays in float, as it does there.

    It stacks samples of one length alone; so one at a time, and the gradients of eight are added. A layer that is run
    several times is tuned on the inputs of its first run: the library stops the model there.
    """
    from auto_round import AutoRound

    guest = copy.deepcopy(model)
    tuner = AutoRound(
        guest,
        tokenizer=Tokens(),
        bits=bits,
        group_size=GROUP,
        sym=bits == 8,  # its file has no asymmetric 8 bit
        iters=TUNED,
        nsamples=sum(len(batch["input_ids"]) for batch in calibration),
        batch_size=1,
        gradient_accumulate_steps=8,
        seqlen=1,  # the shortest sample that it does not leave out
        dataset=single_rows(calibration),
        device_map="cpu",
        amp=False,
    )
    tuner.quantize()
    tuned = {
        n: guest.get_submodule(n).weight.detach().float().clone() for n in quantized_linears(model)
    }
    with tempfile.TemporaryDirectory() as folder:
        tuner.save_quantized(folder, format="auto_round", inplace=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    return Peer(with_weights(model, tuned), size)


class Tokens:
    """What auto-round asks of a tokenizer where the data is tokens already."""

    pad_token_id = 0

    def save_pretrained(self, _folder):
        """Write nothing: the file is the weights."""


def single_rows(calibration):
    """Return the rows of all batches, each alone and without padding, but for one token: the library needs a mask."""
    rows = []
    for batch in calibration:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
            rows.append({key: nn.functional.pad(value, (0, 1)) for key, value in alone.items()})
    return rows


PEERS = {
    "optimum-quanto": by_quanto,
    "torchao": by_torchao,
    "hqq axis 1": partial(by_hqq, axis=1),  # its default, and what its fast kernels need
    "hqq axis 0": partial(by_hqq, axis=0),  # what it recommends for quality
    "auto-round": by_auto_round,
}
WIDTHS = {
    "optimum-quanto": (8, 4, 2),
    "torchao": (8, 6, 4, 3, 2),
    "hqq axis 1": (8, 6, 4, 3, 2),
    "hqq axis 0": (8, 6, 4, 3, 2),
    "auto-round": (8, 4, 3, 2),
}
TRANSFORMERS_ONLY = {"auto-round"}


def label(who):
    """Return the name with the library's version in it, where it is another library."""
    package, _, setting = who.partition(" ")
    return f"{package} {version(package)} {setting}".strip() if who in PEERS else who


def run_peer(who, model, bits, calibration):
    with quiet():
        return PEERS[who](model, bits, calibration)


def with_weights(model, weights):
    """Return a copy of the float model with other weights in it."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            plain = weight.dequantize() if type(weight.data) is not torch.Tensor else weight
            dense.get_submodule(name).weight.copy_(plain)
    return dense


def written(state, config=None):
    """Return the bytes of a state dict as a safetensors file, shared tensors once, and of its configuration."""
    from safetensors.torch import save_file

    unique = {(t.data_ptr(), t.shape) if t.numel() else n: (n, t) for n, t in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({n: t.detach().contiguous() for n, t in unique.values()}, path)
        return path.stat().st_size + (len(json.dumps(config)) if config else 0)


@contextmanager
def quiet():
    """Silence what the libraries log; their errors still raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
