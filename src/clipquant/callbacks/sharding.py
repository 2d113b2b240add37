"""What QuantizeOnFitEnd does where an engine keeps a module's weights in parts, one process each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipquant.callbacks.failures import Failure
from clipquant.callbacks.road.engines import Engine, engine_of, named_tensors
from clipquant.callbacks.road.gather import Missed, gather, write_back_
from clipquant.callbacks.road.memory import available_bytes
from clipquant.callbacks.road.ranks import from_first, gathered
from clipquant.callbacks.settings import Settings
from clipquant.callbacks.shares import Left, Share, Shared, assembled, codes_apart, task_of, wanted
from clipquant.callbacks.telling import warn
from clipquant.errors import ArgumentError
from clipquant.model import QuantizedModel
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.network.bare import bare
from clipquant.quant.network.layers import Selection
from clipquant.quant.recipe import Recipe

COPIES = (
    3  # of the float weights, at most, in the memory of a process that runs the network by itself
)


@dataclass
class Sharding:
    """A module in parts: who gathers what of it, and what was gathered.

    Args:
        engine: What keeps its tensors in parts.
        module: The module.
        settings: What the callback was asked.
        whole: Whether the first process gathers the whole network, to run it; else weights are coded a
            layer at a time, and no process holds more than one layer beside its parts.
        floats: Key -> whole float tensor, in the first process.
        shares: Key -> a weight as codes, in the first process.
        gathered: Whether that was tried.
        failed: Why it did not come about, in every process; empty where it did.
    """

    engine: Engine
    module: pl.LightningModule
    settings: Settings
    whole: bool
    floats: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Any] = field(default_factory=dict)
    gathered: bool = False
    failed: str = ""

    @contextmanager
    def outline(self) -> Iterator[Selection]:
        """Let the module hold shapes without values for a while, and yield what of it is quantized."""
        with outline(self.module, self):
            yield self.settings.recipe.select(self.module)

    @contextmanager
    def put_together(self) -> Iterator[None]:
        """Let the module be whole for a while, in the process that has gathered it, as if trained there."""
        with bare(self.module, self.floats):
            yield

    def _local(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that every process has whole."""
        return ((k, t) for k, t in named_tensors(self.module) if k not in self.engine.blanks)

    def gather_(self) -> None:
        """Gather what the first process needs, and quantize in all of them what can be shared; a collective.

        A failure in any process is told to all, and then nothing counts as gathered.
        """
        self._told_(self._gather_shares_)
        self._take_local_()
        self.gathered = True

    def rehearse(self, rehearsal: Callable[[], tuple[Failure, ...]]) -> tuple[Failure, ...]:
        """Return what a rehearsal on the whole network finds, which the first process gathers for it; a collective.

        Args:
            rehearsal: Runs the module.
        """
        if not self.whole:
            return ()  # nothing will be run
        self._told_(self._gather_floats_)
        self._take_local_()
        found: tuple[Failure, ...] = (self.failure(),) if self.failed else ()
        if dist.get_rank() == 0 and not self.failed:
            with self.put_together():
                found = rehearsal()
        self.floats, self.failed = {}, ""
        return found

    def _take_local_(self) -> None:
        """Keep, in the first process, what every process has whole, as it is now."""
        if dist.get_rank() == 0:
            with bare(self.module):
                own = {k: t.detach().to("cpu", copy=True) for k, t in self._local()}
            self.floats = {**own, **self.floats}

    def _told_(self, step: Callable[[], None]) -> None:
        said = ""
        try:
            step()
        except Exception as error:  # memory, a lost process, whatever an engine raises
            said = f"{type(error).__name__}: {error}"
        told = enumerate(gathered(said))
        self.failed = "; ".join(f"process {rank}: {why}" for rank, why in told if why)

    def _gather_floats_(self) -> None:
        self.floats, _ = gather(self.engine, lambda _: True, lambda *_: None)

    def _gather_shares_(self) -> None:
        if self.whole and self.settings.weights == "best":
            return self._gather_floats_()  # the weights to quantize are in a checkpoint
        recipe = self.recipe
        with self.outline() as selection:
            data = self.whole and self.settings.calibration_batches > 0
            targets = wanted(recipe, selection.targets, data)
            tasks = {target.name: task_of(target, recipe) for target in targets}
        dropped = set() if self.whole else set(tasks)

        def work(key: str, tensor: Tensor) -> Share | Left:
            return tasks[key].share(tensor) if self.whole else tasks[key].share_or_leave(tensor)

        self.floats, self.shares = gather(self.engine, lambda k: k not in dropped, work, tasks)
        for name in tasks.keys() - self.engine.blanks.keys():  # whole in every process
            if dist.get_rank() == 0:
                self.shares[name] = tasks[name].share_or_leave(self._tensor(name))
        return None

    def _tensor(self, name: str) -> Tensor:
        with bare(self.module):
            return dict(self._local())[name].detach()

    def failure(self) -> Failure:
        """Return what is told where the weights could not be gathered."""
        return Failure(
            "gathering the weights of all processes",
            self.failed or "training ended before it could be done",
            "nothing is quantized, and the module keeps its float weights",
            f"Later, from a checkpoint: {self.settings.line()}",
        )

    @property
    def recipe(self) -> Recipe:
        """How weights are quantized: as asked, or each by itself where no process can run the network."""
        if self.whole:
            return self.settings.recipe
        plain = self.settings.plain
        return plain if codes_apart(plain.solver) else replace(plain, method="auto")

    def with_shares(self, recipe: Recipe) -> Recipe:
        """Return a recipe that takes the codes found by all processes where it would find the same."""
        known = {k: s for k, s in self.shares.items() if isinstance(s, Share)}
        if not known or recipe != self.recipe:
            return recipe
        return replace(recipe, method=Shared(recipe.solver, known))

    def assembled(self) -> QuantizedModel:
        """Return the quantized model put together from shares, in the first process of a module never whole."""
        for key, share in self.shares.items():
            if isinstance(share, Missed):
                raise RuntimeError(f"{key}: {share.why}")
        with self.outline() as selection:
            state = {k: v for k, v in self.module.state_dict().items() if isinstance(v, Tensor)}
        size = sum(v.nbytes for k, v in state.items() if k not in selection.aliases)
        taken = {*(t.name for t in selection.targets), *selection.aliases}
        rest = {k: self.floats[k].contiguous() for k in state if k not in taken}
        return assembled(selection, self.shares, rest, size)

    def write_back_(self, made: QuantizedModel | None, every: bool = False) -> None:
        """Give every process its part of the dequantized weights; a collective.

        Args:
            made: In the first process, what is in the file; None: nothing, and the module stays as it is.
            every: Whether other tensors are written too that are as they were when they were gathered.
        """
        with bare(self.module):
            local = dict(self._local())
        keys = from_first(None if made is None else _changed(made, {} if every else self.floats))
        held = {} if made is None else {**made.weights.floats, **made.weights.tensors}
        failed = write_back_(self.engine, local, keys or (), held.__getitem__, _opened)
        self.floats, self.shares = {}, {}
        for rank, said in enumerate(gathered(failed)):
            if said:
                warn(f"Process {rank} keeps float weights: {'; '.join(said)}. The file is whole.")


def sharding_of(
    settings: Settings, trainer: pl.Trainer, module: pl.LightningModule
) -> Sharding | None:
    """Return how a module in parts is quantized; None where every process has all of it. A collective.

    Args:
        settings: What the callback was asked.
        trainer: About to train.
        module: Its module, in the parts that the engine has made.

    Raises:
        ArgumentError: Where what was asked needs the whole network in one process, and it does not fit there.
    """
    engine = engine_of(trainer, module)
    if engine is None:
        return None
    made = Sharding(engine, module, settings, whole=True)
    with made.outline():
        needs = tuple(_needs(settings, trainer, module))
        size = sum(t.nbytes for t in module.state_dict().values() if isinstance(t, Tensor))
    free = from_first(available_bytes())
    fits = free is None or COPIES * size <= free
    made.whole = bool(needs) and fits
    if needs and not fits:
        _tell_too_large(settings, needs, COPIES * size, free or 0)
    return made


@contextmanager
def outline(module: pl.LightningModule, sharding: Sharding | None) -> Iterator[None]:
    """Let a module have the keys and shapes of the whole for a while, and values only where it is not in parts."""
    with bare(module, None if sharding is None else sharding.engine.blanks):
        yield


def _needs(settings: Settings, trainer: pl.Trainer, module: nn.Module) -> Iterator[str]:
    """Yield why a process would have to run the whole network."""
    if settings.auto:
        yield "choosing bits by a budget"
    elif settings.wants_data(module):
        yield f"calibrating (method={settings.recipe.method!r})"
    elif not settings.recipe.needs_data and not codes_apart(settings.recipe.solver):
        yield f"method {settings.recipe.solver.name!r}"
    if settings.weights == "best":
        yield "loading the best checkpoint"
    if trainer.enable_validation:
        yield "judging by validation data"
    if settings.export:
        yield f"exporting to {', '.join(chosen.name for chosen in settings.export)}"


def _tell_too_large(settings: Settings, needs: tuple[str, ...], size: int, free: int) -> None:
    said = (
        f"{', '.join(needs)} runs the whole network in the first process, which takes up to {_giga(size)} of its "
        f"memory; {_giga(free)} are free"
    )
    if settings.auto:
        raise ArgumentError(
            f"{said}. Set bits to a number, which is quantized a layer at a time, or free memory."
        )
    warn(
        f"QuantizeOnFitEnd: {said}. Instead the weights at the end of training are quantized a layer at a time, each "
        "by itself, and are not judged and not exported. Later, on a larger machine: "
        "clipquant.quantize(module, data=...) and clipquant export."
    )


def _giga(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def when_train_ends(trainer: pl.Trainer, work: Callable[[], None]) -> None:
    """Let some work be done when training has ended and the strategy still stands.

    The strategy's own hook is the last: callbacks and the module may change weights in theirs.
    """
    strategy: Any = trainer.strategy
    own = strategy.on_train_end

    def on_train_end() -> None:
        strategy.on_train_end = own
        own()
        work()

    strategy.on_train_end = on_train_end


def _changed(made: QuantizedModel, before: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the keys whose tensors in the file are others than they were."""
    floats = made.weights.floats
    moved = {k for k, v in floats.items() if k not in before or not torch.equal(v.cpu(), before[k])}
    return frozenset({*made.weights.tensors, *moved})


def _opened(held: QuantizedTensor | Tensor) -> Tensor:
    return held if isinstance(held, Tensor) else dequantize(held)
