"""The report's figures in the Trainer's own loggers."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger

from clipquant.callbacks.telling import warn
from clipquant.report.record import QuantizationReport


def log_report(report: QuantizationReport, loggers: Iterable[Logger], step: int) -> None:
    """Write the report's figures to the Trainer's loggers as metrics, its choices as hyper-parameters.

    `self.log` raises at the end of a fit, so the loggers are told themselves; one that cannot take
    them is named in a warning and the others still are told.
    """
    choices = {f"quantized/bits/{layer.name}": layer.bits for layer in report.layers}
    for logger in loggers:
        try:
            logger.log_hyperparams(choices)
            logger.log_metrics(report.figures(), step)
            logger.save()
        except Exception as error:  # noqa: PERF203 - each logger fails by itself
            warn(
                f"{type(logger).__name__} did not take the quantization figures "
                f"({type(error).__name__}: {error}); they stand in report.json."
            )
