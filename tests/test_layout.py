"""Tests mirror the package: each module has a test file of its own name, or a reason here not to have one."""

from pathlib import Path

import pytest

import clipquant

SOURCE, TESTS = Path(clipquant.__file__).parent, Path(__file__).parent

REASONS = {
    "_version.py": "one constant, compared with the program's own in cli/test_program.py",
    "artifact/content.py": "artifact/test_artifact.py and artifact/test_packed_load.py: the file as a whole",
    "artifact/entries.py": "artifact/test_hostile.py: every field refused by name, artifact/test_fuzz.py",
    "artifact/envelope.py": "artifact/test_artifact.py: the file as a whole",
    "artifact/fault.py": "test_shown.py: its text on terminals",
    "artifact/schema.py": "artifact/test_hostile.py: every field refused by name, artifact/test_fuzz.py",
    "artifact/weights.py": "artifact/test_hostile.py: every field refused by name, artifact/test_fuzz.py",
    "callbacks/auto.py": "budget/test_search.py runs it in real fits",
    "callbacks/checkpoint.py": "callbacks/test_quantize.py runs it in real fits",
    "callbacks/clip_attached.py": "callbacks/test_clip_changes.py runs it in real fits",
    "callbacks/clip_evaluations.py": "callbacks/test_gradient_clip_kinds.py runs it in real fits",
    "callbacks/clip_figures.py": "callbacks/test_gradient_clip.py runs it in real fits",
    "callbacks/clip_folding.py": "callbacks/test_gradient_clip_precision.py folds in real fits",
    "callbacks/clip_resume.py": "callbacks/test_gradient_clip_training.py resumes real fits",
    "callbacks/clip_scaler.py": "callbacks/test_gradient_clip_precision.py runs it in real fits",
    "callbacks/clip_targets.py": "callbacks/test_gradient_clip_kinds.py runs it in real fits",
    "callbacks/course.py": "callbacks/test_qat.py: shares of every kind of fit",
    "callbacks/failures.py": "callbacks/test_fault_injection.py: what is told of a step that fails",
    "callbacks/fit_end.py": "callbacks/test_fault_injection.py: every step, and each of them failing",
    "callbacks/folder.py": "callbacks/test_life_cycle.py, test_rehearsal.py and quantize_checks.py: where files go",
    "callbacks/ladder.py": "callbacks/test_fault_injection.py: every way down",
    "callbacks/loggers.py": "callbacks/test_quantize.py runs it in real fits",
    "callbacks/qat_auto.py": "callbacks/test_qat.py: bits that budgets choose, trained",
    "callbacks/qat_checks.py": "callbacks/test_qat.py: what is refused before a fit",
    "callbacks/quantize_checks.py": "callbacks/test_quantize.py: what is refused before a fit",
    "callbacks/road/engines.py": "callbacks/sharding_checks.py: every engine in two processes",
    "callbacks/road/gather.py": "callbacks/sharding_checks.py: gathered and written back by two processes",
    "callbacks/road/data.py": "callbacks/test_life_cycle.py and test_rehearsal.py: every kind of dataloader",
    "callbacks/road/loss.py": "budget/test_search.py: the training step's loss, and without one",
    "callbacks/road/logged.py": "callbacks/test_watch.py: what logged objects say, in real fits",
    "callbacks/road/precision.py": "callbacks/test_life_cycle.py: every precision",
    "callbacks/road/road.py": "callbacks/road/test_guest.py and test_judge.py: all that runs on it",
    "callbacks/road/silence.py": "callbacks/road/test_guest.py: what loggers and the terminal hear",
    "callbacks/settings.py": "callbacks/test_quantize.py and budget/test_search.py: what was asked, in real fits",
    "callbacks/sparsify_checks.py": "callbacks/test_sparsify.py: what is refused before a fit",
    "callbacks/takeover.py": "callbacks/test_qat.py: what was trained is what is written",
    "callbacks/shares.py": "callbacks/test_sharding.py: each weight apart as in its model",
    "callbacks/telling.py": "callbacks/test_watch.py: warnings show no source",
    "cli/command.py": "a record and an error, without logic",
    "clip/job.py": "clip/test_apply.py and test_gradients.py: which gradients there are, in which form",
    "clip/outcome.py": "a record; clip/test_apply.py shows what it tells",
    "clip/shards.py": "clip/test_distributed.py runs it in two processes",
    "clip/unread.py": "clip/test_remote.py: figures of every rule, read at once",
    "export/parts/format.py": "export/test_formats.py: a format of one's own through all that reads one",
    "export/parts/learned.py": "callbacks/test_qat.py: ranges that were trained in an int8 file",
    "export/parts/needs.py": "export/test_formats.py: what is missing is named",
    "export/parts/onnx_graph.py": "export/test_onnx.py and test_onnx_int8.py: every file is made of it",
    "export/parts/qdq.py": "export/test_onnx_int8.py: every file is made by it",
    "export/parts/subject.py": "records; export/test_formats.py shows what they refuse",
    "quant/codes/adaptive.py": "quant/codes/test_entropy.py: what is foretold, and every stream by it",
    "quant/codes/lines.py": "quant/codes/test_entropy.py: matrices to lines and back",
    "quant/codes/layout.py": "quant/codes/test_ranges.py: every layout there and back",
    "quant/codes/tensor.py": "quant/codes/test_ranges.py and test_pack.py: codes there and back",
    "quant/codes/weights.py": "quant/test_quantize.py: a whole model's weights",
    "quant/error/descent.py": "quant/methods/test_layerwise.py: no output gets worse",
    "quant/error/own_error.py": "quant/methods/test_adaround.py: no output gets worse",
    "quant/error/walk.py": "quant/methods/test_layerwise.py: layer after layer",
    "quant/methods/auto.py": "quant/methods/test_layerwise.py: the better of two methods",
    "quant/methods/gptq.py": "quant/methods/test_layerwise.py: against a slow reference",
    "quant/network/calibration.py": "callbacks/road/test_calibration.py and quant/methods/test_layerwise.py",
    "quant/network/known.py": "quant/network/test_replay.py: outputs given again, and given up",
    "quant/network/noise.py": "quant/network/test_moments.py: chance told from signal",
    "quant/network/outputs.py": "quant/methods/test_adaround.py: outputs of every form",
    "quant/network/patches.py": "quant/methods/test_layerwise.py: convolutions against torch's own",
    "quant/network/sums.py": "quant/error/test_output_error.py and quant/network/test_moments.py",
    "quant/network/taint.py": "quant/network/test_replay.py: who reads what",
    "quant/network/wanted.py": "quant/methods/test_distill.py: what is wanted, by whom, and how near it is",
    "quant/network/watches.py": "quant/methods/test_layerwise.py: every kind of layer, used once, twice or never",
    "quant/packed/layers.py": "quant/packed/test_modules.py: every kind of layer",
    "quant/packed/weight.py": "quant/packed/test_modules.py: every width and layout",
    "quant/training/running.py": "callbacks/test_qat.py: begun, resumed and finished in real fits",
    "quant/widths/table.py": "quant/widths/test_rows.py: rows at every width",
    "report/digits.py": "report/test_table.py, and its examples",
    "report/summary.py": "report/test_table.py and test_record.py: what is printed",
    "report/worries.py": "report/test_record.py: what is told, and in which order",
}


def modules():
    return sorted(
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py"
    )


@pytest.mark.skipif(not SOURCE.is_relative_to(TESTS.parent), reason="tests of another source tree")
def test_every_module_has_a_test_file_or_a_reason_not_to():
    missing = [
        name
        for name in modules()
        if not (TESTS / name).with_name(f"test_{Path(name).name}").is_file() and name not in REASONS
    ]
    assert missing == [], "write tests/ROOM/test_MODULE.py, or a reason in tests/test_layout.py"


@pytest.mark.skipif(not SOURCE.is_relative_to(TESTS.parent), reason="tests of another source tree")
def test_every_reason_is_still_needed():
    needless = [
        name
        for name in REASONS
        if name not in modules() or (TESTS / name).with_name(f"test_{Path(name).name}").is_file()
    ]
    assert needless == [], "take these out of tests/test_layout.py"
