"""Third-party libraries' own LightningModules, each trained for some steps on data made here.

Every function trains with the callbacks and Trainer arguments given and nothing else of ours; `libraries.py` runs it in
an environment where its library is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Fit = Callable[..., None]


def _quiet(**given: Any) -> dict[str, Any]:
    return {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **given,
    }


def _series(length: int = 200) -> torch.Tensor:
    time = torch.arange(length, dtype=torch.float32)
    noise = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(0))
    return torch.sin(time / 6) + 0.3 * torch.sin(time / 2.5) + noise


def demo_transformer(**trainer: Any) -> None:
    """Lightning's own demo: a language model."""
    import lightning.pytorch as pl
    from lightning.pytorch.demos.transformer import LightningTransformer

    class Validated(LightningTransformer):
        def prepare_data(self) -> None:
            """Download nothing: the tokens are drawn here."""

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.training_step(batch, index))

    tokens = torch.randint(0, 50, (64, 12), generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), 16)
    pl.Trainer(**_quiet(**trainer)).fit(Validated(vocab_size=50), data, data)


def darts_tide(**trainer: Any) -> None:
    """darts: TiDE, on `pytorch_lightning`."""
    import numpy as np
    from darts import TimeSeries
    from darts.models import TiDEModel

    series = TimeSeries.from_values(_series().numpy().astype(np.float32))
    model = TiDEModel(
        24,
        6,
        hidden_size=32,
        n_epochs=2,
        batch_size=32,
        random_state=0,
        pl_trainer_kwargs=_quiet(**trainer),
    )
    model.fit(series[:150], val_series=series[120:], verbose=False)


def darts_nbeats(**trainer: Any) -> None:
    """darts: N-BEATS, on `pytorch_lightning`."""
    import numpy as np
    from darts import TimeSeries
    from darts.models import NBEATSModel

    series = TimeSeries.from_values(_series().numpy().astype(np.float32))
    model = NBEATSModel(
        24,
        6,
        num_stacks=2,
        num_blocks=1,
        num_layers=2,
        layer_widths=128,
        n_epochs=2,
        random_state=0,
        pl_trainer_kwargs=_quiet(**trainer),
    )
    model.fit(series[:150], val_series=series[120:], verbose=False)


def neuralforecast_nhits(**trainer: Any) -> None:
    """neuralforecast: NHITS, on `pytorch_lightning`."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    y = _series().numpy()
    frame = pd.DataFrame(
        {"unique_id": "a", "ds": pd.date_range("2020-01-01", periods=len(y)), "y": y}
    )
    given = _quiet(**trainer)
    given.pop("max_epochs")
    model = NHITS(
        h=6, input_size=24, max_steps=30, val_check_steps=10, mlp_units=3 * [[32, 32]], **given
    )
    NeuralForecast([model], freq="D").fit(frame, val_size=24)


def chemprop_mpnn(**trainer: Any) -> None:
    """chemprop: a message-passing network over molecules."""
    import lightning.pytorch as pl
    import numpy as np
    from chemprop import data, models
    from chemprop import nn as chem

    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "C(=O)O", "c1ccccc1")]
    points = [data.MoleculeDatapoint.from_smi(s, np.array([float(len(s))])) for s in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=8, shuffle=False)
    model = models.MPNN(
        chem.BondMessagePassing(d_h=32), chem.MeanAggregation(), chem.RegressionFFN(input_dim=32)
    )
    pl.Trainer(**_quiet(**trainer)).fit(model, loader, loader)


def forecasting_tft(**trainer: Any) -> None:
    """pytorch-forecasting: the temporal fusion transformer."""
    import lightning.pytorch as pl
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    y = _series().numpy()
    frame = pd.DataFrame({"time": range(len(y)), "group": "a", "y": y})
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="y",
        group_ids=["group"],
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["y"],
    )
    loader = data.to_dataloader(train=False, batch_size=32)
    model = TemporalFusionTransformer.from_dataset(data, hidden_size=32, learning_rate=0.01)
    pl.Trainer(**_quiet(**trainer)).fit(model, loader, loader)


def gluonts_deepar(**trainer: Any) -> None:
    """gluonts: DeepAR, which draws samples in its steps."""
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    entry = {"start": "2020-01-01", "target": _series().numpy()}
    data = ListDataset([entry] * 4, freq="D")
    given = _quiet(**{**trainer, "enable_checkpointing": True})
    given["default_root_dir"] = tempfile.mkdtemp()
    given.setdefault("gradient_clip_val", None)
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=6,
        context_length=24,
        hidden_size=16,
        batch_size=16,
        num_batches_per_epoch=10,
        trainer_kwargs=given,
    )
    estimator.train(data, validation_data=data)


def timm_resnet(**trainer: Any) -> None:
    """timm: an image model in a LightningModule."""
    import lightning.pytorch as pl
    import timm

    class Images(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("mobilenetv3_small_050", num_classes=4)

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.training_step(batch, index))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    data = DataLoader(TensorDataset(x, x[:, 0, 0, :4].argmax(1)), 16)
    pl.Trainer(**_quiet(**trainer)).fit(Images(), data, data)


def pyg_graphs(**trainer: Any) -> None:
    """torch-geometric: GIN over graphs, through its own LightningDataset."""
    import lightning.pytorch as pl
    from torch_geometric.data import Data
    from torch_geometric.data.lightning import LightningDataset
    from torch_geometric.nn import GIN, global_mean_pool
    from torch_geometric.nn import Linear as GraphLinear

    class Graphs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = GIN(8, 64, 2), GraphLinear(64, 3)

        def forward(self, data: Any) -> Any:
            x = global_mean_pool(self.net(data.x, data.edge_index), data.batch)
            return self.head(x)

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self(batch), batch.y)

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.training_step(batch, index), batch_size=batch.num_graphs)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(48):
        x = torch.randn(6, 8, generator=generator)
        edges = torch.randint(0, 6, (2, 12), generator=generator)
        graphs.append(Data(x=x, edge_index=edges, y=x.mean(0)[:3].argmax().reshape(1)))
    data = LightningDataset(graphs, graphs, batch_size=16)
    pl.Trainer(**_quiet(**trainer)).fit(Graphs(), datamodule=data)


def schnetpack_task(**trainer: Any) -> None:
    """schnetpack: an AtomisticTask with SchNet, on `pytorch_lightning`."""
    import numpy as np
    import pytorch_lightning as pl
    import schnetpack as spk
    import torchmetrics
    from ase import Atoms

    folder = Path(tempfile.mkdtemp())
    atoms, targets = [], []
    for n in range(60):
        far = 0.9 + 0.01 * n
        atoms.append(Atoms("OH2", positions=[[0, 0, 0], [far, 0, 0], [0, far, 0]]))
        targets.append({"energy": np.array([far])})
    own = spk.data.ASEAtomsData.create(
        str(folder / "a.db"), distance_unit="Ang", property_unit_dict={"energy": "eV"}
    )
    own.add_systems(targets, atoms)
    data = spk.data.AtomsDataModule(
        str(folder / "a.db"),
        batch_size=10,
        num_train=40,
        num_val=20,
        split_file=str(folder / "s.npz"),
        transforms=[spk.transform.ASENeighborList(cutoff=5.0), spk.transform.CastTo32()],
        num_workers=0,
        pin_memory=False,
    )
    net = spk.model.NeuralNetworkPotential(
        representation=spk.representation.SchNet(
            n_atom_basis=32,
            n_interactions=2,
            radial_basis=spk.nn.GaussianRBF(n_rbf=10, cutoff=5.0),
            cutoff_fn=spk.nn.CosineCutoff(5.0),
        ),
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=32, output_key="energy")],
    )
    output = spk.task.ModelOutput(
        "energy",
        loss_fn=nn.MSELoss(),
        loss_weight=1.0,
        metrics={"MAE": torchmetrics.MeanAbsoluteError()},
    )
    task = spk.task.AtomisticTask(net, [output], torch.optim.AdamW, {"lr": 1e-3})
    pl.Trainer(**_quiet(**trainer)).fit(task, datamodule=data)


def scvi_vae(**trainer: Any) -> None:
    """scvi-tools: a variational autoencoder of gene counts, with a Trainer of its own."""
    import anndata
    import numpy as np
    import scvi

    counts = np.random.default_rng(0).poisson(2.0, (200, 200)).astype(np.float32)
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    given = _quiet(**trainer)
    epochs = given.pop("max_epochs")
    model = scvi.model.SCVI(data, n_hidden=128, n_latent=8)
    model.train(max_epochs=epochs, train_size=0.8, check_val_every_n_epoch=1, **given)


def rl4co_tsp(**trainer: Any) -> None:
    """rl4co: an attention model that learns routes by REINFORCE."""
    from rl4co.envs import TSPEnv
    from rl4co.models import AttentionModel
    from rl4co.utils import RL4COTrainer

    env = TSPEnv(generator_params={"num_loc": 8})
    model = AttentionModel(
        env,
        baseline="exponential",
        batch_size=16,
        train_data_size=160,
        val_data_size=32,
        test_data_size=32,
        policy_kwargs={"embed_dim": 32, "num_encoder_layers": 1, "num_heads": 4},
    )
    given = _quiet(**trainer)
    given.setdefault("gradient_clip_val", None)
    RL4COTrainer(**given).fit(model)


def finetuning_schedule(**trainer: Any) -> None:
    """finetuning-scheduler: layers thawed by a schedule, beside our callbacks."""
    import lightning.pytorch as pl
    from finetuning_scheduler import FinetuningScheduler
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    class Layers(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.layer = nn.Linear(32, 256), nn.Linear(256, 2)

        def forward(self, x: Any) -> Any:
            return self.layer(torch.relu(self.body(x)))

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.loss(self(batch)))

    data = DataLoader(RandomDataset(32, 64), 16)
    given = _quiet(**{**trainer, "enable_checkpointing": True, "max_epochs": 3})
    given["default_root_dir"] = tempfile.mkdtemp()
    own = FinetuningScheduler()
    pl.Trainer(**{**given, "callbacks": [own, *given.get("callbacks", ())]}).fit(
        Layers(), data, data
    )


def lightly_linear(**trainer: Any) -> None:
    """lightly: the linear classifier of its benchmarks."""
    import pytorch_lightning as pl
    from lightly.utils.benchmarking import LinearClassifier

    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU())
    model = LinearClassifier(body, batch_size_per_device=16, feature_dim=32, num_classes=4)
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = x.flatten(1)[:, :4].argmax(1)
    data = DataLoader([(a, b, "") for a, b in zip(x, labels, strict=True)], 16)
    pl.Trainer(**_quiet(**trainer)).fit(model, data, data)


# Name -> what pip installs beside torch and lightning, what is imported, and the fits.
LIBRARIES: dict[str, tuple[tuple[str, ...], str, tuple[Fit, ...]]] = {
    "lightning": ((), "lightning", (demo_transformer,)),
    "darts": (("darts", "pytorch-lightning"), "darts.models", (darts_tide, darts_nbeats)),
    "neuralforecast": (("neuralforecast",), "neuralforecast", (neuralforecast_nhits,)),
    "chemprop": (("chemprop",), "chemprop", (chemprop_mpnn,)),
    "pytorch-forecasting": (("pytorch-forecasting",), "pytorch_forecasting", (forecasting_tft,)),
    "gluonts": (("gluonts[torch]",), "gluonts.torch", (gluonts_deepar,)),
    "timm": (("timm",), "timm", (timm_resnet,)),
    "torch-geometric": (("torch-geometric",), "torch_geometric", (pyg_graphs,)),
    "schnetpack": (("schnetpack",), "schnetpack", (schnetpack_task,)),
    "scvi-tools": (("scvi-tools",), "scvi", (scvi_vae,)),
    "rl4co": (("rl4co",), "rl4co.models", (rl4co_tsp,)),
    "finetuning-scheduler": (
        ("finetuning-scheduler",),
        "finetuning_scheduler",
        (finetuning_schedule,),
    ),
    "lightly": (("lightly",), "lightly.utils.benchmarking", (lightly_linear,)),
}
