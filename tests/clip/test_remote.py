"""On an accelerator every rule does what it does on a CPU, and one value a step is read at most."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from tests.clip.pretend import Accelerator, Remote, remote
from torch import Tensor, nn

from clipquant import GradientClipCallback
from clipquant.clip import AGC, AdaGC, AutoClip, Chain, Indicator, Norm, Value, ZClip
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign
from clipquant.clip.fold import can_skip, fold_, skip_where_, unfold_, unfold_after_step
from clipquant.clip.progress import Progress
from clipquant.clip.unread import UnreadRecord

QUIET = [
    Norm(0.5),
    Norm(1e4),
    Norm(math.inf),
    Norm(0.5, scope="tensor"),
    Norm(0.5, scope="group"),
    Norm(0.5, "inf"),
    Norm(0.5, warmup_steps=3),
    Value(0.3),
    Value(1e4),
    AGC(0.02),
    AGC(0.02, axis=1),
    AGC(1e4),
    Indicator(0.4),
    Chain(AGC(0.02), Norm(0.5)),
    Chain(Value(0.3), AGC(0.02), Norm(0.1)),
]
ADAPTIVE = [
    AutoClip(40),
    ZClip(z=0.5, warmup=1, max_norm=0.7),
    AdaGC(ratio=0.8, warmup=1, max_norm=0.5),
    Chain(AGC(0.02), ZClip(warmup=1)),
]
SHAPES = [(4, 3), (7,), (), (2, 3, 3)]
POLICIES = ["skip", "propagate", "raise", "zero", "leave", "defer"]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with Accelerator() as found:
        yield found


def pair(seed: int, bad: float | None = None) -> tuple[list[Any], list[Any]]:
    """Return the same parameters with gradients on the CPU and on the accelerator."""
    generator = torch.Generator().manual_seed(seed)
    near: list[Any] = []
    far: list[Any] = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator)
        grad = torch.randn(shape, generator=generator)
        if bad is not None and shape == (7,):
            grad[3] = bad
        near.append(weight.clone().requires_grad_())
        near[-1].grad = grad.clone()
        far.append(remote(weight).requires_grad_())
        far[-1].grad = remote(grad)
    return near, far


def same(near: Tensor | None, far: Any, exact: bool = False) -> None:
    if near is None:
        assert far is None
        return
    rtol = 0.0 if exact else 1e-5
    torch.testing.assert_close(far.held, near, rtol=rtol, atol=rtol / 10, equal_nan=True)


@pytest.mark.parametrize("rule", QUIET + ADAPTIVE, ids=repr)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_does_what_it_does_on_a_cpu_and_reads_one_value(
    rule: Any, policy: Any, accelerator: Accelerator
) -> None:
    state, known = None, None
    for step in range(3):
        near, far = pair(step)
        ours, theirs = assign(far, rule), assign(near, rule)
        accelerator.reads = 0
        record = clip_assigned_(ours, state, on_nonfinite=policy)
        quiet = rule in QUIET and policy in ("propagate", "defer")
        # An error has to come before the first rule changes what the second has to know.
        twice = rule == ADAPTIVE[-1] and policy in ("raise", "zero", "leave")
        assert accelerator.reads <= (0 if quiet else 1 + twice)
        reference = clip_assigned_(theirs, known, on_nonfinite=policy)
        for a, b in zip(near, far, strict=True):
            same(a.grad, b.grad)
        assert record.clipped == reference.clipped
        for name in ("grad_norm", "grad_norm_clipped", "clip_coef", "nonzero_share"):
            ours_is, theirs_is = getattr(record, name), getattr(reference, name)
            # A clamp on a CPU measures nothing that nobody asked for.
            assert theirs_is is None or ours_is == pytest.approx(theirs_is, rel=1e-5)
        assert record.norms_clipped.tolist() == pytest.approx(  # type: ignore[union-attr]
            reference.norms_clipped.tolist(),  # type: ignore[union-attr]
            rel=1e-4,
        )
        assert accelerator.reads <= (1 if quiet else 2 + twice), "all figures come in one go"
        assert set(record.state) == set(reference.state)
        state, known = record.state, reference.state


@pytest.mark.parametrize("rule", [Norm(1e4), Value(1e4), AGC(1e4)], ids=repr)
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_what_is_within_stays_bit_for_bit(rule: Any, policy: Any, accelerator: Accelerator) -> None:
    near, far = pair(0)
    assert not clip_assigned_(assign(far, rule), on_nonfinite=policy).clipped
    for a, b in zip(near, far, strict=True):
        same(a.grad, b.grad, exact=True)


@pytest.mark.parametrize("rule", QUIET + ADAPTIVE, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_with_its_name(
    rule: Any, bad: float, accelerator: Accelerator
) -> None:
    _, far = pair(0, bad)
    record = clip_assigned_(assign(far, rule), on_nonfinite="skip")
    assert record.skipped
    assert not record.clipped
    assert record.nonfinite == ("1",)
    assert record.grad_norm_clipped == 0.0
    assert all(param.grad is None for param in far)


@pytest.mark.parametrize("rule", QUIET + ADAPTIVE, ids=repr)
def test_an_error_comes_before_anything_has_changed(rule: Any, accelerator: Accelerator) -> None:
    near, far = pair(0, math.nan)
    with pytest.raises(FloatingPointError, match="gradients in 1:"):
        clip_assigned_(assign(far, rule), on_nonfinite="raise")
    for a, b in zip(near, far, strict=True):
        same(a.grad, b.grad, exact=True)
    clip_assigned_(assign(far, rule), on_nonfinite="leave")
    for a, b in zip(near, far, strict=True):
        same(a.grad, b.grad, exact=True)


@pytest.mark.parametrize("rule", [Norm(0.5), Value(0.3), AGC(0.02)], ids=repr)
def test_zeroing_is_that_of_a_cpu(rule: Any, accelerator: Accelerator) -> None:
    near, far = pair(0, math.inf)
    record = clip_assigned_(assign(far, rule), on_nonfinite="zero")
    reference = clip_assigned_(assign(near, rule), on_nonfinite="zero")
    for a, b in zip(near, far, strict=True):
        same(a.grad, b.grad)
    assert record.nonfinite == reference.nonfinite == ("1",)


def test_a_limit_beyond_which_steps_are_skipped(accelerator: Accelerator) -> None:
    _, far = pair(0)
    record = clip_assigned_(assign(far, Norm(0.5)), skip_above=1.0)
    assert record.skipped
    assert accelerator.reads == 1
    assert all(param.grad is None for param in far)
    _, far = pair(0)
    assert not clip_assigned_(assign(far, Norm(0.5)), skip_above=100.0).skipped


def test_groups_with_rules_of_their_own(accelerator: Accelerator) -> None:
    near, far = pair(0)
    records = []
    for params in (near, far):
        groups = [
            {"params": params[:1], "clip": Value(0.1)},
            {"params": params[1:3], "clip": ZClip(warmup=1, max_norm=0.2)},
            {"params": params[3:]},
        ]
        accelerator.reads = 0
        records.append(clip_assigned_(assign(groups, Norm(0.5))))
    assert accelerator.reads <= 1
    for a, b in zip(near, far, strict=True):
        same(a.grad, b.grad)
    assert records[1].grad_norm_clipped == pytest.approx(records[0].grad_norm_clipped, rel=1e-5)


def test_squares_that_overflow_are_finite(accelerator: Accelerator) -> None:
    param = remote(torch.ones(2)).requires_grad_()
    param.grad = remote(torch.tensor([3e30, 4e30]))
    record = clip_assigned_(assign([param], Norm(1.0)))
    assert not record.skipped
    assert record.grad_norm == pytest.approx(5e30, rel=1e-6)
    assert param.grad.held.tolist() == pytest.approx([0.6, 0.8])


def test_an_unread_record_is_read_once_and_can_be_sent(accelerator: Accelerator) -> None:
    _, far = pair(0)
    accelerator.reads = 0
    record = clip_assigned_(assign(far, Value(0.3)), on_nonfinite="propagate")
    assert isinstance(record, UnreadRecord)
    assert "UnreadRecord" in type(record).__name__
    assert (record.clipped, record.skipped, record.nonfinite) == (True, False, ())
    assert record.deferred is None
    assert accelerator.reads == 1
    sent = pickle.loads(pickle.dumps(record))
    assert sent.grad_norm == record.grad_norm


def test_progress_counts_unread_steps_in_one_read(accelerator: Accelerator) -> None:
    progress = Progress()
    for step in range(5):
        _, far = pair(step, math.nan if step == 3 else None)
        record = clip_assigned_(assign(far, Norm(0.5)), on_nonfinite="defer", measure=False)
        progress = progress.after(record, step)
    assert accelerator.reads == 0
    settled = progress.settled()
    assert accelerator.reads == 1
    assert (settled.steps, settled.clipped_steps, settled.skipped_steps) == (5, 4, 1)
    assert settled.streak == ()
    assert progress.state_dict()["steps"] == 5
    assert settled.settled() is settled


def fused(params: list[Any], **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, fused=True, **kwargs)


@pytest.fixture
def fused_kernels() -> Iterator[None]:
    name = "_get_fused_kernels_supported_devices"
    kinds = ["cpu", "meta"]
    with (
        patch(f"torch.utils._foreach_utils.{name}", lambda: kinds),
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: kinds),
        patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_, **__: None),
    ):
        yield


@pytest.mark.parametrize("rule", [Norm(0.5), Value(0.3), Chain(AGC(0.02), Norm(0.5))], ids=repr)
def test_a_fused_step_clips_and_skips_without_a_read(
    rule: Any, accelerator: Accelerator, fused_kernels: None
) -> None:
    near, far = pair(0)
    ours, theirs = fused(far), torch.optim.AdamW(near, lr=0.1)
    assert can_skip(ours)
    unfold_after_step(ours)
    accelerator.reads = 0
    for step in range(4):
        new_near, new_far = pair(10 + step, math.nan if step == 2 else None)
        for param, new in zip([*near, *far], [*new_near, *new_far], strict=True):
            param.grad = new.grad
        record: Any = clip_assigned_(assign(far, rule), on_nonfinite="defer", defer=True)
        if record.coefficient is not None:
            fold_(ours, record.coefficient, far[0].device)
        skip_where_(ours, record.flags[1])
        ours.step()
        assert not hasattr(ours, "found_inf")
        assert not hasattr(ours, "grad_scale")
        clip_assigned_(assign(near, rule), on_nonfinite="skip")
        theirs.step()
        for a, b in zip(near, far, strict=True):
            same(a.detach(), b.detach())
    assert accelerator.reads == 0


def test_momentum_that_has_not_begun_is_not_skipped_on_the_device() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    assert not can_skip(optimizer)
    optimizer.step()
    assert can_skip(optimizer)


def test_a_flag_of_a_grad_scaler_stays() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer: Any = torch.optim.AdamW([weight], fused=True)
    optimizer.found_inf = torch.ones(())
    unfold_(optimizer)
    assert hasattr(optimizer, "found_inf")


class Host(pl.LightningModule):
    """A module that keeps what is logged."""

    def __init__(self, params: list[Any]) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []
        self.params = params

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter([(f"p{i}", param) for i, param in enumerate(self.params)])

    def log_dict(self, dictionary: Any, **_: Any) -> None:
        self.logged.append(dict(dictionary))


@pytest.mark.parametrize("log", [True, "groups", "params"])
@pytest.mark.parametrize(
    ("rule", "is_fused", "allowed"),
    [
        (Norm(0.5), False, 1),
        (Norm(0.5), True, 0),
        (Value(0.3), False, 1),
        (Value(0.3), True, 0),
        (AGC(0.02), False, 1),
        (ZClip(warmup=1), False, 1),
        (ZClip(warmup=1), True, 1),
        (Indicator(0.1), False, 1),
        (Chain(AGC(0.02), Norm(0.5)), True, 0),
    ],
    ids=str,
)
def test_the_callback_reads_one_value_a_step_and_one_more_to_log(
    rule: Any, is_fused: bool, allowed: int, log: Any, accelerator: Accelerator, fused_kernels: None
) -> None:
    _, far = pair(0)
    optimizer = fused(far) if is_fused else torch.optim.SGD(far, lr=0.1)
    module: Any = Host(far)
    callback = GradientClipCallback(rule, log=log)
    connector = SimpleNamespace(should_update_logs=False)
    trainer: Any = SimpleNamespace(
        optimizers=[optimizer],
        callbacks=[callback],
        precision_plugin=None,
        _logger_connector=connector,
        global_step=0,
    )
    for step in range(4):
        for param, new in zip(far, pair(step)[1], strict=True):
            param.grad = new.grad
        trainer.global_step, connector.should_update_logs = step, step == 3
        accelerator.reads = 0
        callback.on_before_optimizer_step(trainer, module, optimizer)
        assert accelerator.reads <= allowed + (step == 3)
        optimizer.step()
    (logged,) = module.logged
    assert logged["clip_rate"] > 0
    assert logged["grad_norm"] != logged["grad_norm_clipped"]
    assert ("grad_norm/p0" in logged) == (log == "params")
    assert all(isinstance(param, Remote) for param in far)
