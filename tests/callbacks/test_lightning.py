"""One callback class for the Trainers of both packages, and which package an object belongs to."""

from __future__ import annotations

import pickle
import subprocess
import sys

import lightning.pytorch as pl
import pytest

from clipquant.callbacks.lightning import Callback, callback_bases, is_overridden, package_of

other = pytest.importorskip("pytorch_lightning")


class Mine(Callback):
    def on_fit_end(self, trainer, pl_module):
        pass


@pytest.mark.parametrize("package", [pl, other], ids=["lightning", "pytorch_lightning"])
def test_a_callback_is_one_of_either_package(package):
    assert isinstance(Mine(), package.Callback)
    assert issubclass(Callback, package.Callback)


@pytest.mark.parametrize("package", [pl, other], ids=["lightning", "pytorch_lightning"])
def test_the_package_of_trainers_modules_data_and_callbacks(package):
    trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    class Module(package.LightningModule):
        pass

    class Data(package.LightningDataModule):
        pass

    things = [trainer, Module(), Data(), trainer.strategy, package.callbacks.Timer()]
    assert [package_of(thing) for thing in things] == [package] * 5


def test_an_object_of_neither_package_is_refused():
    with pytest.raises(TypeError, match="dict is no class of Lightning"):
        package_of({})


@pytest.mark.parametrize("package", [pl, other], ids=["lightning", "pytorch_lightning"])
def test_overridden_hooks_of_modules_and_callbacks(package):
    class Module(package.LightningModule):
        def on_before_optimizer_step(self, optimizer):
            pass

    class Heir(Module):
        pass

    assert is_overridden("on_before_optimizer_step", Heir())
    assert not is_overridden("on_fit_end", Heir())
    assert not is_overridden("on_fit_end", package.Callback())
    assert is_overridden("on_fit_end", Mine())
    assert not is_overridden("on_fit_start", Mine())


def test_a_hook_set_on_the_instance_counts():
    module = pl.LightningModule()
    module.on_fit_end = lambda: None
    assert is_overridden("on_fit_end", module)


def test_the_state_key_and_pickling_are_those_of_a_plain_callback():
    assert Mine().state_key == "Mine"
    assert isinstance(pickle.loads(pickle.dumps(Mine())), Mine)


@pytest.mark.parametrize("fault", ["absent", "broken"])
def test_without_a_usable_second_package_there_is_one_base(fault, tmp_path):
    if fault == "absent":
        hide = "sys.modules['pytorch_lightning'] = None"
    else:
        (tmp_path / "pytorch_lightning.py").write_text("raise OSError('built for another torch')")
        hide = f"sys.path.insert(0, {str(tmp_path)!r})"
    code = f"import sys; {hide}\n"
    code += "from clipquant.callbacks.lightning import Callback, callback_bases\n"
    code += "print(Callback.__mro__[1].__module__, len(callback_bases()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["lightning.pytorch.callbacks.callback", "1"]


def test_both_bases_here():
    assert callback_bases() == (pl.Callback, other.Callback)
