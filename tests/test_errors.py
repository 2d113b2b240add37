"""One base for what a user can mend, beside the built-in errors that callers catch."""

import importlib
import inspect
import pkgutil

import pytest

import clipquant
from clipquant import errors
from clipquant.errors import ClipquantError


def own_errors():
    """Every error class, as distinct from signals of control flow, that a module of the package defines."""
    for found in pkgutil.walk_packages(clipquant.__path__, "clipquant."):
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            raised = inspect.isclass(value) and value.__name__.endswith("Error")
            if (
                raised
                and issubclass(value, Exception)
                and value.__module__.startswith("clipquant.")
            ):
                yield value


def test_every_error_of_the_package_has_the_base():
    strays = {error.__qualname__ for error in own_errors() if not issubclass(error, ClipquantError)}
    assert strays == set()


@pytest.mark.parametrize(
    ("error", "built_in"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ArgumentTypeError, TypeError),
        (errors.RunError, RuntimeError),
        (errors.PlaceError, OSError),
        (errors.MissingFileError, FileNotFoundError),
        (errors.MissingPackageError, ModuleNotFoundError),
    ],
)
def test_callers_catch_the_built_in_error_too(error, built_in):
    with pytest.raises(built_in, match="bits"):
        raise error("bits must be 1 to 8; got 9.")


def test_a_place_error_carries_its_number_as_oserror_does():
    assert errors.PlaceError(28, "full").errno == 28
