"""What a callback found reaches the one that the user holds: from other processes, and from copies."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from clipquant import QuantizeOnFitEnd
from clipquant.callbacks.delivery import Parcel, hand_over


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_report_and_path_come_back_to_the_main_process(strategy: str, tmp_path: Any) -> None:
    script = tmp_path / "fit.py"
    script.write_text(
        textwrap.dedent(f"""
        import lightning.pytorch as pl, torch
        from torch.utils.data import DataLoader, TensorDataset
        from clipquant import QuantizeOnFitEnd, load_quantized

        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.Linear(8, 4)
            def training_step(self, batch, _):
                return self.a(batch[0]).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        if __name__ == "__main__":
            callback, net = QuantizeOnFitEnd(8, method="rtn"), Net()
            pl.Trainer(accelerator="cpu", devices=2, strategy={strategy!r}, max_epochs=1, callbacks=[callback],
                       logger=False, enable_checkpointing=False, enable_progress_bar=False,
                       enable_model_summary=False, default_root_dir={str(tmp_path)!r}).fit(
                net, DataLoader(TensorDataset(torch.randn(16, 8)), 4))
            stored = load_quantized(callback.artifact_path)
            assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())
            assert callback.report.layers[0].bits == 8
            print("delivered")
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "delivered" in done.stdout, done.stderr[-2000:]


def test_a_copy_that_fitted_hands_over_to_the_one_that_has_not() -> None:
    first = QuantizeOnFitEnd(8)
    copied = copy.deepcopy(first)
    hand_over(copied, Parcel(copied._token, {"report": "of the copy"}))
    assert first.report == "of the copy"


def test_a_parcel_arrives_when_it_is_unpickled() -> None:
    callback = QuantizeOnFitEnd(8)
    pickle.loads(pickle.dumps(Parcel(callback._token, {"report": "sent"})))
    assert callback.report == "sent"
    pickle.loads(pickle.dumps(Parcel("of nobody", {"report": "lost"})))
