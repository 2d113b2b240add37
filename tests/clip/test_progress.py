"""Counts over the steps of one optimizer, and their way through a checkpoint."""

from __future__ import annotations

import io

import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.clip import ClipRecord
from clipquant.clip.measured import Measured
from clipquant.clip.progress import Progress


def norm(value: float) -> Measured:
    return Measured(torch.tensor([value], dtype=torch.float64))


KINDS = {
    "plain": ClipRecord(before=norm(1.0)),
    "clipped": ClipRecord(before=norm(9.0), clipped=True),
    "skipped": ClipRecord(before=norm(float("inf")), skipped=True, nonfinite=("a", "b")),
    "too large": ClipRecord(before=norm(1e9), skipped=True),
}
STEPS = st.lists(st.sampled_from(sorted(KINDS)), max_size=30)


def after(kinds: list[str]) -> Progress:
    progress = Progress()
    for step, kind in enumerate(kinds):
        progress = progress.after(KINDS[kind], step)
    return progress


@given(STEPS)
def test_counts_are_those_of_the_steps(kinds: list[str]) -> None:
    progress = after(kinds)
    skipped = [kind in ("skipped", "too large") for kind in kinds]
    assert progress.steps == len(kinds)
    assert progress.clipped_steps == kinds.count("clipped")
    assert progress.skipped_steps == sum(skipped)
    assert progress.clip_rate == (kinds.count("clipped") / len(kinds) if kinds else 0.0)
    streak = next((i for i, skip in enumerate(reversed(skipped)) if not skip), len(kinds))
    assert [skip.step for skip in progress.streak] == list(range(len(kinds) - streak, len(kinds)))


@given(STEPS)
def test_a_checkpoint_without_pickled_classes_carries_everything(kinds: list[str]) -> None:
    progress = after([*kinds, "plain"])
    progress = Progress(**{**vars(progress), "state": {"mean": torch.tensor([1.5])}})
    progress = progress.after(
        ClipRecord(before=norm(2.0), skipped=True, state=progress.state), len(kinds) + 1
    )
    file = io.BytesIO()
    torch.save(progress.state_dict(), file)
    file.seek(0)
    loaded = Progress.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.state["mean"], progress.state["mean"])
    assert {**vars(loaded), "state": None} == {**vars(progress), "state": None}


def test_a_skip_says_its_step_norm_and_parameters() -> None:
    names = tuple(f"layer{i}.weight" for i in range(5))
    record = ClipRecord(before=norm(float("nan")), skipped=True, nonfinite=names)
    (skip,) = Progress().after(record, 7).streak
    assert str(skip) == (
        "step 7: gradient norm nan, NaN or infinite in layer0.weight, layer1.weight, layer2.weight and 2 more"
    )
    (spike,) = Progress().after(ClipRecord(before=norm(123.456), skipped=True), 8).streak
    assert str(spike) == "step 8: gradient norm 123.5"
