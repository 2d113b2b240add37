"""What clipping costs beside torch, timm and Composer: the table in benchmarks/README.md.

Usage: python benchmarks/clip.py [--only value norm step agc fit]. Every row is one interleaved run: all contenders
start from the same gradients in every round, their order is shuffled, and the medians are compared.
"""

import argparse
import importlib.util
import itertools
import logging
import random
import statistics
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from clipquant import GradientClipCallback, TwoConvNet, clip_gradients_
from clipquant.clip import AGC, Norm, Value
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign
from clipquant.clip.fold import fold_, unfold_

ROUNDS = {"20 k": 400, "11 M": 31, "29 M": 15}


class Block(nn.Module):
    """The weights of a residual block of ResNet-18, in the order of its gradients."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )


def models():
    """Return modules of 20 thousand, 11 million (ResNet-18) and 29 million parameters (a transformer)."""
    small = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(448, 32), nn.Linear(32, 10)
    )
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    stem = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    resnet = nn.Sequential(*stem, *blocks, nn.Linear(512, 1000))
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    transformer = nn.TransformerEncoder(layer, 9, enable_nested_tensor=False)
    return {
        "20 k": small,
        "11 M": resnet,
        "29 M": nn.Sequential(nn.Embedding(1000, 512), transformer),
    }


def with_gradients(model, scale):
    """Give every parameter a gradient of normal numbers and return both."""
    params = list(model.parameters())
    gradients = [scale * torch.randn_like(p) for p in params]
    for param in params:
        param.grad = torch.empty_like(param)
    return params, gradients


CLOCK = time.perf_counter


def medians(contenders, before, rounds):
    """Return the median milliseconds of each contender; `before()` restores the gradients, untimed."""
    times = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 2):
        random.shuffle(names)
        for name in names:
            before()
            start = CLOCK()
            contenders[name]()
            if number >= 2:  # the first rounds warm up
                times[name].append(CLOCK() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def as_callback(params, rule, measure=True, later=True):
    """Return what GradientClipCallback runs in a step that the Trainer does not log, with its own defaults."""
    assignment = assign(params, rule)
    return lambda: clip_assigned_(assignment, on_nonfinite="skip", measure=measure, later=later)


def on_logging_step(params, rule):
    """Return what GradientClipCallback runs in a step that the Trainer logs: the norms are read too."""
    clip = as_callback(params, rule, later=False)

    def run():
        record = clip()
        return record.grad_norm, record.grad_norm_clipped

    return run


def compare(what, model, scale, contenders, size):
    """Print one row for each of ours: `contenders(params)` gives theirs first, then ours by name."""
    params, gradients = with_gradients(model, scale)

    def restore():
        for param, gradient in zip(params, gradients, strict=True):
            if param.grad is None:
                raise RuntimeError("a step was skipped")
            param.grad.copy_(gradient)

    found = medians(contenders(params), restore, ROUNDS[size])
    report(what, size, found)
    return found


def report(what, size, found):
    (peer, theirs), *ours = found.items()
    for name, milliseconds in ours:
        ratio = f"{milliseconds / theirs:.2f}"
        print(
            f"| {what}, {size} | {peer} {theirs:.3g} ms | {name} {milliseconds:.3g} ms | {ratio} |"
        )


def value(size, model):
    def contenders(limit):
        return lambda params: {
            "clip_grad_value_": lambda: nn.utils.clip_grad_value_(params, limit),
            "`clip_gradients_`": lambda: clip_gradients_(params, Value(limit)),
            "callback, log=False": as_callback(params, Value(limit), measure=False),
            "callback": as_callback(params, Value(limit)),
            "callback, logging": on_logging_step(params, Value(limit)),
        }

    compare("value, nothing beyond the limit", model, 0.01, contenders(1.0), size)
    compare("value, every tensor clipped", model, 1.0, contenders(1.0), size)


def norm(size, model):
    def contenders(limit):
        return lambda params: {
            "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(params, limit),
            "callback": as_callback(params, Norm(limit)),
            "callback, logging": on_logging_step(params, Norm(limit)),
        }

    compare("norm, nothing to clip", model, 0.01, contenders(1e4), size)
    compare("norm, clipping", model, 1.0, contenders(1.0), size)


def step(size, model):
    def contenders(params):
        theirs, ours = (torch.optim.AdamW(params, lr=1e-6, fused=True) for _ in range(2))
        assignment = assign(params, Norm(1.0))

        def peer():
            nn.utils.clip_grad_norm_(params, 1.0)
            theirs.step()

        def folded():
            record = clip_assigned_(assignment, on_nonfinite="skip", measure=True, defer=True)
            fold_(ours, record.deferred, torch.device("cpu"))
            ours.step()
            unfold_(ours)

        return {"clip_grad_norm_ + step": peer, "callback + step": folded}

    compare("norm and fused AdamW step, clipping", model, 1.0, contenders, size)


def timm_agc():
    """Return timm's function, from its one file: the package imports torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        raise SystemExit("timm is not installed: pip install --no-deps timm")
    spec = importlib.util.spec_from_file_location(
        "timm_agc", Path(found.origin).parent / "utils" / "agc.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


def composer_agc(params, ratio=0.01, eps=1e-3):
    """Clip tensor by tensor in the way of Composer: norms of both, a coefficient that is 1 within, one multiply."""

    def unit_norm(tensor):
        if tensor.ndim < 2:
            return torch.linalg.vector_norm(tensor)
        return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)

    for param in params:
        largest = unit_norm(param.detach()).clamp_(min=eps).mul_(ratio)
        coefficient = largest.div_(unit_norm(param.grad)).nan_to_num_(nan=1.0).clamp_(max=1.0)
        param.grad.detach().mul_(coefficient)


def agc(size, model):
    timm = timm_agc()

    def contenders(params):
        return {
            "Composer-style": lambda: composer_agc(params),
            "timm": lambda: timm(params, clip_factor=0.01),
            "callback, log=False": as_callback(params, AGC(0.01), measure=False),
            "callback": as_callback(params, AGC(0.01)),
            "callback, logging": on_logging_step(params, AGC(0.01)),
        }

    compare("AGC, nothing beyond the ratio", model, 1e-6, contenders, size)
    compare("AGC, every unit clipped", model, 1.0, contenders, size)


class Alternating(pl.Callback):
    """Lets a clipping callback work in every third step each, none in the others, and times all steps.

    A step lasts from the end of one batch to the end of the next: loading, logging and everything else included.
    """

    def __init__(self, callbacks):
        self.callbacks = callbacks
        self.seconds, self.last, self.step = {name: [] for name in callbacks}, None, 0

    def _active(self):
        name = list(self.callbacks)[self.step % len(self.callbacks)]
        return name, self.callbacks[name]

    def setup(self, *args, **kwargs):
        for callback in filter(None, self.callbacks.values()):
            callback.setup(*args, **kwargs)

    def on_fit_start(self, *args):
        for callback in filter(None, self.callbacks.values()):
            callback.on_fit_start(*args)

    def on_before_optimizer_step(self, *args):
        callback = self._active()[1]
        if callback is not None:
            callback.on_before_optimizer_step(*args)

    def on_train_batch_end(self, *_):
        now = CLOCK()
        if self.last is not None and self.step >= 30:
            self.seconds[self._active()[0]].append(now - self.last)
        self.last, self.step = now, self.step + 1


def fit(folder="benchmark_logs"):
    """Time the steps of one fit of TwoConvNet, with and without clipping in turn, logging every tenth step."""
    for batch, steps in ((1, 1500), (64, 360)):
        torch.manual_seed(0)
        images, labels = torch.randn(8 * batch, 1, 28, 28), torch.randint(0, 10, (8 * batch,))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch)
        alternating = Alternating(
            {
                "Trainer.fit": None,
                "with `Value(1.0)`": GradientClipCallback(Value(1.0)),
                "with `Norm(1.0)`": GradientClipCallback(Norm(1.0)),
            }
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            log_every_n_steps=10,
            logger=CSVLogger(folder),
            callbacks=[alternating],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(TwoConvNet(lr=1e-3), data)
        found = {k: 1e3 * statistics.median(v) for k, v in alternating.seconds.items()}
        report("a step of fit, TwoConvNet", f"batch {batch}", found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["value", "norm", "step", "agc", "fit"])
    parser.add_argument("--sizes", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", action="store_true", help="time one thread's work, on a busy machine"
    )
    args = parser.parse_args()
    if args.work:
        global CLOCK
        CLOCK = time.process_time
    torch.set_num_threads(1 if args.work else args.threads)
    torch.manual_seed(0)
    print("| what | peer | clipquant | ratio |\n|---|---:|---:|---:|")
    for question in (value, norm, step, agc):
        if args.only is None or question.__name__ in args.only:
            for size, model in models().items():
                if size in args.sizes:
                    question(size, model)
    if args.only is None or "fit" in args.only:
        fit()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
