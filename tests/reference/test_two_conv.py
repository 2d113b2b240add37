import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from clipquant.reference import RandomDigit, TwoConvNet


def make_trainer(tmp_path, **settings):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"logger": False, **settings},
    )


def test_layers_are_those_of_the_reference():
    net = TwoConvNet()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


def test_forward_is_two_convolutions_and_the_mnist_head():
    net = TwoConvNet().eval()
    x = torch.randn(3, 1, 28, 28)
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), net.fc1, nn.ReLU(), net.fc2)
    features = F.conv2d(
        F.conv2d(x, net.conv1.weight, net.conv1.bias).relu(), net.conv2.weight, net.conv2.bias
    ).relu()
    torch.testing.assert_close(net.forward_features(x), features)
    torch.testing.assert_close(net(x), head(features))


def test_dropout_works_in_training_only():
    net, x = TwoConvNet(), torch.randn(4, 1, 28, 28)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_accuracy_and_loss_are_those_of_all_images(tmp_path):
    torch.manual_seed(0)
    net = TwoConvNet()
    images, labels = torch.randn(10, 1, 28, 28), torch.randint(0, 10, (10,))
    # Batches of 4, 4 and 2: a mean of the batches' figures would differ from the mean over the images.
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=4)
    trainer = make_trainer(tmp_path)
    logged = trainer.validate(net, loader, verbose=False)[0]
    test = trainer.test(net, loader, verbose=False)[0]
    with torch.no_grad():
        logits = net.eval()(images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert logged["val_acc"] == pytest.approx(accuracy, abs=1e-7)
    assert logged["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert test == {"test_acc": pytest.approx(accuracy, abs=1e-7)}


def test_training_learns_and_logs(tmp_path):
    torch.manual_seed(0)
    net = TwoConvNet(optimizer="SGD", lr=0.01)
    trainer = make_trainer(
        tmp_path, max_steps=100, logger=CSVLogger(tmp_path), log_every_n_steps=10
    )
    trainer.fit(net, RandomDigit())
    assert {"train_loss", "val_loss", "val_acc"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["train_loss"] < 0.05
    assert trainer.callback_metrics["val_acc"] == 1


def test_prediction_takes_batches_with_and_without_labels(tmp_path):
    net = TwoConvNet().eval()
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(
        net.predict_step(images), net.predict_step((images, torch.zeros(2, dtype=torch.long)))
    )
    (logits,) = make_trainer(tmp_path).predict(net, RandomDigit())
    assert logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [("constant", 0.1, 0.1), ("cosine", 0.1, 0.1 * 0.024472), ("one_cycle", 0.004, 4e-7)],
)
def test_schedule_runs_over_the_whole_training(tmp_path, schedule, first, last):
    net = TwoConvNet(optimizer="SGD", lr=0.1, schedule=schedule, optimizer_args={"momentum": 0.9})
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    rates = []
    net.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer.fit(net, RandomDigit(steps=5))
    assert len(rates) == 10
    assert rates[0] == pytest.approx(first)
    assert rates[-1] == pytest.approx(last, rel=1e-4)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9


def test_checkpoint_restores_settings_and_weights(tmp_path):
    net = TwoConvNet(num_classes=7, optimizer="Adam", lr=0.5, optimizer_args={"eps": 1e-6})
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(net, RandomDigit(steps=1, target=3))
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = TwoConvNet.load_from_checkpoint(tmp_path / "net.ckpt")
    assert (again.lr, again.optimizer_name, again.optimizer_args) == (0.5, "Adam", {"eps": 1e-6})
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items()
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 1}, "at least 2, got 1"),
        ({"optimizer": "AdamWW"}, "'AdamWW'"),
        ({"optimizer": "Optimizer.step"}, "torch.optim"),
        ({"schedule": "linear"}, "'linear'"),
    ],
)
def test_wrong_settings_are_told(settings, words):
    with pytest.raises(ValueError, match=words):
        TwoConvNet(**settings)
