"""Do both callbacks work in modules that nobody here wrote? Third-party libraries, each in an environment of its own.

    python benchmarks/libraries.py [NAME ...] [--folder FOLDER]

Each library is installed from PyPI, torch and lightning by the versions of constraints.txt first; one that cannot be
installed is skipped with the reason. Then its own LightningModules (`library_fits.py`) are trained for some steps at 8
bits, at 4, and by a budget of the size at 8. Printed for each: whether the file equals the module, how far the
report's metric is from a validation of the reloaded file by a Trainer of its own, what was lost (steps that failed),
and how far weights clipped by our callback are from those clipped by the library's own `gradient_clip_val`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from library_fits import LIBRARIES, Fit

HERE = Path(__file__).resolve().parent
FIRST = ("torch", "lightning", "torchmetrics", "safetensors", "numpy")
SETTINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "auto, as 8 bits": {"bits": "auto"},
}
CLIP = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "libraries"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside)
        return
    print("| library | module | setting | file = module | metric off by | lost | clipped, off by |")
    print("|---|---|---|---|---|---|---|")
    for name in args.names or LIBRARIES:
        why = install(name, Path(args.folder) / name)
        for row in (
            [f"| {name} | skipped: {why} |"] if why else rows(name, Path(args.folder) / name)
        ):
            print(row, flush=True)


def install(name: str, folder: Path) -> str:
    """Make an environment with a library; return why there is none."""
    python = folder / "bin" / "python"
    if (folder / "done").exists():
        return ""
    pinned = (HERE.parent / "constraints.txt").read_text().splitlines()
    pins = [p.partition(";")[0].strip() for p in pinned if p.partition("==")[0] in FIRST]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        for wanted in (pins, LIBRARIES[name][0]):  # torch first, or pip may take another build
            if wanted:
                subprocess.run(
                    [*pip, *wanted, "-c", str(constraints)],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=1800,
                )
    except (subprocess.SubprocessError, OSError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return said[-1][:160] if said else type(error).__name__
    (folder / "done").touch()
    return ""


def rows(name: str, folder: Path) -> list[str]:
    """Return the table's rows of a library."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    command = [str(folder / "bin" / "python"), __file__, "--inside", name]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=3600
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    last = done.stderr.strip().splitlines()[-1:] or ["no output"]
    return found or [f"| {name} | failed: {last[0][:200]} |"]


def inside(name: str) -> None:
    """Print the rows of a library, in its environment."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        importlib.import_module(LIBRARIES[name][1])
    except Exception as error:  # built for another torch
        print(f"| {name} | skipped: its import fails: {type(error).__name__}: {str(error)[:120]} |")
        return
    for fit in LIBRARIES[name][2]:
        clipped = clip_difference(fit)
        size = 0
        for setting, arguments in SETTINGS.items():
            given = {"max_size": size} if arguments["bits"] == "auto" else {}
            found, size = outcome(fit, {**arguments, **given}, size)
            said = " | ".join(found)
            print(f"| {name} | {fit.__name__} | {setting} | {said} | {clipped} |", flush=True)
            clipped = "as above"


def outcome(fit: Fit, arguments: dict[str, Any], size: int) -> tuple[tuple[str, str, str], int]:
    """Return whether file and module are equal, how far the metric is off, what was lost; and the size at 8 bits."""
    from clipquant import QuantizeOnFitEnd, load_quantized

    keep, folder = keeper(), tempfile.mkdtemp()
    quantizer = QuantizeOnFitEnd(dirpath=folder, **arguments)
    try:
        seeded_fit(fit, callbacks=[keep, quantizer])
    except Exception as error:
        traceback.print_exc()
        return ("-", "-", f"the fit: {type(error).__name__}: {str(error)[:120]}"), size
    report = quantizer.report
    if report is None or quantizer.artifact_path is None:
        return ("-", "-", "the file"), size
    stored = load_quantized(quantizer.artifact_path)
    equal = all(torch.equal(v, stored[k]) for k, v in keep.state.items() if k in stored)
    keep.module.load_state_dict(stored, strict=False)
    lost = "; ".join(report.failures)[:160] or "nothing"
    found = "yes" if equal else "NO", metric_difference(keep, report), lost
    return found, report.size_bytes if arguments["bits"] == 8 else size


def metric_difference(keep: Any, report: Any) -> str:
    """Return the largest relative difference between the report's metrics and a validation of the file's weights."""
    from clipquant.callbacks.lightning import package_of

    if not report.quantized_metrics:
        return "no metric"
    trainer = package_of(keep.trainer).Trainer(
        accelerator="cpu",
        devices=1,
        precision=keep.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=keep.trainer.limit_val_batches,
    )
    source = keep.trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders = getattr(source.instance, source.name)() if source.is_module() else source.instance
    with contextlib.redirect_stdout(io.StringIO()):
        keep.module.validation_step = same_noise(keep.module.validation_step)
        trainer.validate(keep.module, dataloaders=loaders, verbose=False)
    off = [
        abs(float(trainer.callback_metrics[k]) - v) / max(abs(v), 1e-9)
        for k, v in report.quantized_metrics.items()
        if k in trainer.callback_metrics
    ]
    return f"{max(off):.1e}" if off else "no metric"


def same_noise(step: Any) -> Any:
    """Return a step that draws, at each batch, the numbers that the report's judge has drawn."""
    number = iter(range(1 << 30))

    @functools.wraps(step)
    def seeded(*args: Any) -> Any:
        torch.manual_seed(next(number))
        return step(*args)

    return seeded


def clip_difference(fit: Fit) -> str:
    """Return how far apart weights are that our callback clipped and that the Trainer's own clipping did."""
    from clipquant import GradientClipCallback
    from clipquant.clip import Norm

    found = []
    own: dict[str, Any] = {"gradient_clip_val": CLIP, "callbacks": []}
    for given in ({"callbacks": [GradientClipCallback(Norm(CLIP))]}, own, own):
        keep = keeper()
        try:
            seeded_fit(fit, **{**given, "callbacks": [keep, *given["callbacks"]]})
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error)[:80]}"
        found.append([p.detach().clone() for p in keep.module.parameters()])
    ours, theirs, again = found
    apart, spread = farthest(ours, theirs), farthest(theirs, again)
    return f"{apart:.1e}" + (f" (theirs run twice: {spread:.1e})" if spread else "")


def farthest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest difference between two lists of weights."""
    pairs = zip(one, other, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def seeded_fit(fit: Fit, **trainer: Any) -> None:
    """Train with the same random numbers each time."""
    import lightning.pytorch as pl

    pl.seed_everything(0, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        fit(**trainer)


def keeper() -> Any:
    """Return a callback that keeps the Trainer and the module of a fit, as does every copy of it."""
    from clipquant.callbacks.lightning import Callback

    class Keep(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":  # of the class: a library may copy its callbacks
                Keep.trainer, Keep.module = trainer, pl_module

        def teardown(self, _: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":  # the library itself may load other weights afterwards
                Keep.state = {k: v.clone() for k, v in pl_module.state_dict().items()}

    return Keep()


if __name__ == "__main__":
    main()
