"""Made-up files with right digests: calls return or raise ArtifactError, soon and in little memory."""

import importlib.util
import resource
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
INPUTS = 5_000


@pytest.fixture(scope="module")
def fuzz():
    if not PATH.is_file():
        pytest.skip("benchmarks/ is not here")
    spec = importlib.util.spec_from_file_location("clipquant_fuzz", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_nothing_but_an_artifact_error_leaves(fuzz, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = fuzz.fuzz(INPUTS, 7, tmp_path)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert not outcome.other, outcome.other.most_common(5)
    assert outcome.inputs > 0.9 * INPUTS
    assert outcome.loaded > INPUTS / 20, (
        "mutants that load show that what is behind the digests is reached"
    )
    assert outcome.refused > INPUTS
    assert len(outcome.rules) > 100
    assert more < 64 + 8, "a few small files took more memory than any one may"
    assert outcome.slowest < 2


@pytest.mark.filterwarnings("ignore")
def test_a_real_file_survives_being_taken_apart_and_put_together(fuzz, tmp_path):
    for number, seed in enumerate(fuzz.seeds()):
        path = tmp_path / str(number)
        path.write_bytes(fuzz.put_together(seed.parts))
        assert fuzz.verify_artifact(path) == []
