"""Settings that every test shares."""

import os

from hypothesis import settings

# A loaded machine must not fail an example for its time; CI must find the same examples twice.
settings.register_profile("clipquant", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("clipquant")
