"""Settings that every test shares."""

import os

# Lightning's log handler keeps the stderr of its first import, which must outlive a single test's.
import lightning.pytorch  # noqa: F401
from hypothesis import settings

# A loaded machine must not fail an example for its time; CI must find the same examples twice.
settings.register_profile("clipquant", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("clipquant")
