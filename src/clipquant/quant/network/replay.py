"""Passes that do not run again what is settled: parts of a network that give their known outputs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clipquant.quant.network.calibration import Calibration, EndLoop
from clipquant.quant.network.known import Known, flat_tensors, is_same, known
from clipquant.quant.network.taint import Taint
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.watches import plain_attention

MOST_BYTES = 1 << 30  # of outputs kept in all; parts whose outputs find no room are run again
_STEPS = 4  # most passes that the weights of one part may take before it is looked at more closely

Key: TypeAlias = tuple[int, int]  # which twin, which batch


class Enough(BaseException):
    """Ends a pass whose rest nobody asks for; no `except Exception` of user code takes it."""


class Differs(Exception):  # noqa: N818 - an answer, not an error
    """Raised by a pass in which a part met something else than in the whole network."""


@dataclass
class Part:
    """A module that is called once in a pass, with some of the weights.

    Args:
        module: The module.
        names: The weights inside.
        readers: Numbers of the parts that read what it gave, directly or not; -1: what comes after all parts.
    """

    module: nn.Module
    names: frozenset[str]
    readers: set[int] = field(default_factory=set)


class Replay:
    """What is known of the parts of a network whose weights have their last values.

    A pass replaces the `forward` of every such part by one that gives the output which it gave before for
    the same batch. So each step of going down the network runs only the code between the parts, and the
    part at work. An output that no part still to come reads is given up, and zeros stand for it.

    Whether that holds is tried, not assumed: on the first batch every part must meet, to the last bit,
    what it meets in a pass of the whole network; see `parts_of` and `Differs`.

    Args:
        parts: In the order of their calls.
        met: What each part met on the first batch in the float network.
        most: Most bytes kept.
    """

    def __init__(
        self, parts: Sequence[Part], met: Mapping[int, list[Tensor]], most: int = MOST_BYTES
    ) -> None:
        self.parts, self.met, self.most = list(parts), dict(met), most
        self.inside = [set(map(id, part.module.modules())) for part in self.parts]
        self.final: set[str] = set()
        self.kept: dict[Key, dict[int, Known]] = {}

    def settle_(self, names: Sequence[str]) -> None:
        """Say that some weights have their last values."""
        self.final.update(names)

    def off_(self) -> None:
        """Run all of the network from now on."""
        self.parts, self.met, self.inside = [], {}, []
        self.kept.clear()

    def part_of(self, modules: Sequence[nn.Module]) -> int | None:
        """Return the part that holds all of some modules."""
        asked = set(map(id, modules))
        return next((number for number, ids in enumerate(self.inside) if asked <= ids), None)

    @contextmanager
    def passing(self, key: Key, last: int | None) -> Iterator[None]:
        """Let the parts that are settled give what is known of them, and end the pass after the last one asked for.

        Args:
            key: Number of the twin, 0 for the float network, and of the batch.
            last: Number of the part after which nothing is of use; None: the pass runs to its end.
        """
        known_here = self.kept.setdefault(key, {})
        with ExitStack() as undo:
            for number, part in enumerate(self.parts):
                call = partial(self._called, number, known_here, key == (0, 0))
                undo.enter_context(in_place_of_forward(part.module, call))
            if last is not None:
                handle = self.parts[last].module.register_forward_hook(_end)
                undo.callback(handle.remove)
            with suppress(Enough):
                yield
        self._give_up_(known_here)

    def _called(
        self, number: int, held: dict[int, Known], first: bool, own: Any, args: Any, kwargs: Any
    ) -> Any:
        part = self.parts[number]
        settled = part.names <= self.final
        if settled and number in held:
            return held[number].value()
        met = self.met.get(number) if first else None
        if met is not None and not is_same(flat_tensors((args, kwargs)), met):
            raise Differs
        output = own(*args, **kwargs)
        if settled:
            if first:
                self.met.pop(number, None)
            made = known(output)
            if made is not None and self._bytes() + made.nbytes <= self.most:
                held[number] = made
        return output

    def _bytes(self) -> int:
        return sum(made.nbytes for held in self.kept.values() for made in held.values())

    def _give_up_(self, held: dict[int, Known]) -> None:
        """Forget the values of outputs that every reader has taken in."""
        for number, made in held.items():
            readers = self.parts[number].readers
            if readers and readers <= held.keys():
                made.give_up_()


def parts_of(
    model: nn.Module,
    calibration: Calibration,
    steps: Sequence[Sequence[str]],
    most: int = MOST_BYTES,
) -> Replay:
    """Return the parts of a network that can be replayed, none where that is not proven on the first batch.

    Three passes on it: one counts calls, one notes what every part meets and gives, and in the third
    each part gives what it gave; all must meet the same again, and the outputs must be the same.

    Args:
        model: In eval mode.
        calibration: Batches, and how to run them.
        steps: Names of the weights that are solved after one pass each.
        most: Most bytes kept.
    """
    proven: tuple[list[Part], dict[int, list[Tensor]]] = ([], {})

    def visit(_number: int, batch: Any) -> None:
        nonlocal proven
        with suppress(Exception), torch.no_grad(), plain_attention():  # what raises is not proven
            proven = _proven(Twin(model), calibration, batch, steps)
        raise EndLoop

    if not any(map(_is_compiled, model.modules())):
        calibration.each(visit, [0])
    return Replay(*proven, most)


def _is_compiled(module: nn.Module) -> bool:
    own = getattr(module, "_compiled_call_impl", None) is not None
    return own or isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")


def _proven(
    twin: Twin, calibration: Calibration, batch: Any, steps: Sequence[Sequence[str]]
) -> tuple[list[Part], dict[int, list[Tensor]]]:
    calls = _calls(twin, calibration, batch)
    parts = list(_parts(twin.model, twin.model, calls, steps))
    met: dict[int, list[Tensor]] = {}
    given: dict[int, Known | None] = {}

    def note(number: int, own: Any, args: Any, kwargs: Any) -> Any:
        met[number] = [t.detach().clone() for t in flat_tensors((args, kwargs))]
        output = own(*args, **kwargs)
        given[number] = known(output)
        return output

    whole = _run_with(twin, calibration, batch, parts, note)
    order = list(met)  # that of the calls
    if len(order) < 2 or None in given.values():
        return [], {}
    taint, seen = Taint(), dict[int, list[Tensor]]()

    def give(number: int, _own: Any, args: Any, kwargs: Any) -> Any:
        tensors = flat_tensors((args, kwargs))
        seen[number] = [t.clone() for t in tensors]  # compared later: comparing reads out
        for read in taint.of(tensors):
            parts[read].readers.add(number)
        made = given[number]
        output = None if made is None else made.value()
        taint.mark_(flat_tensors(output), number)
        return output

    with taint:
        again = _run_with(twin, calibration, batch, parts, give)
    for read in (*taint.of(again), *taint.told):
        parts[read].readers.add(-1)
    same = list(seen) == order and all(is_same(seen[n], met[n]) for n in order)
    if not same or not is_same(again, whole):
        return [], {}
    place = {number: i for i, number in enumerate(order)} | {-1: -1}
    for part in parts:
        part.readers = {place[reader] for reader in part.readers}
    return [parts[n] for n in order], {place[n]: tensors for n, tensors in met.items()}


def _run_with(
    twin: Twin, calibration: Calibration, batch: Any, parts: Sequence[Part], call: Any
) -> list[Tensor]:
    """Run a batch with a call in place of each part's, and return what came of it."""
    with ExitStack() as undo:
        for number, part in enumerate(parts):
            undo.enter_context(in_place_of_forward(part.module, partial(call, number)))
        return flat_tensors(twin.run(calibration.forward, batch))


def _calls(twin: Twin, calibration: Calibration, batch: Any) -> dict[int, int]:
    """Return how often each module, by its id, is called in a pass."""
    calls: dict[int, int] = {}

    def count(module: nn.Module, _args: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1

    handles = [module.register_forward_pre_hook(count) for module in twin.model.modules()]
    try:
        twin.run(calibration.forward, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _parts(
    model: nn.Module, module: nn.Module, calls: Mapping[int, int], steps: Sequence[Sequence[str]]
) -> Iterator[Part]:
    """Yield the largest modules inside one that are called once and hold weights of few steps."""
    inside = set(map(id, module.modules()))
    own = [{name for name in step if _holder(model, name) in inside} for step in steps]
    taken = [names for names in own if names]
    if not taken:
        return
    if module is not model and calls.get(id(module)) == 1 and len(taken) <= _STEPS:
        yield Part(module, frozenset().union(*taken))
        return
    for child in module.children():
        yield from _parts(model, child, calls, steps)


def _holder(model: nn.Module, name: str) -> int:
    return id(model.get_submodule(name.rpartition(".")[0]))


@contextmanager
def in_place_of_forward(module: nn.Module, call: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Let `call(own forward, args, kwargs)` stand for a module's forward for a while; its hooks stay."""
    held, own = vars(module), module.forward
    had, before = "forward" in held, held.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(own, args, kwargs)

    held["forward"] = forward
    try:
        yield
    finally:
        held.pop("forward", None)
        if had:
            held["forward"] = before


def _end(_module: nn.Module, _args: Any, _output: Any) -> None:
    raise Enough
