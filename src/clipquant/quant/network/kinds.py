"""The kinds of layers whose weights are known: what each holds, and how it folds into rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from clipquant.quant.codes.layout import Layout

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Weighted = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
_Recurrent = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Ends of what a weight or spectral norm, or pruning, makes a weight of before each forward.
REBUILT = ("_orig", "_g", "_v")


def layouts(module: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Yield each weight that a module of a known kind holds itself, by its name, and how it folds into rows.

    A stack of experts' matrices is a parameter of three axes of a module whose class is called so.

    >>> [(name, layout.rows) for name, layout in layouts(nn.LSTM(3, 4))]
    [('weight_ih_l0', 16), ('weight_hh_l0', 16)]
    """
    own = {n: p for n, p in module._parameters.items() if p is not None and not is_lazy(p)}
    if _is_conv1d_of_transformers(module) and own.get("weight") is not None:
        yield "weight", Layout(tuple(module.weight.shape), 1)  # type: ignore[arg-type]
    elif isinstance(module, _Transposed) and own.get("weight") is not None:
        yield "weight", Layout(tuple(module.weight.shape), 1, module.groups)
    elif isinstance(module, _Weighted) and own.get("weight") is not None:
        yield "weight", Layout(tuple(module.weight.shape))
    elif isinstance(module, nn.MultiheadAttention):
        names: Iterable[str] = _ATTENTION
        yield from ((n, Layout(tuple(p.shape))) for n in names if (p := own.get(n)) is not None)
    elif isinstance(module, _Recurrent):
        names = [name for name in own if name.startswith(("weight_ih", "weight_hh", "weight_hr"))]
        names = [name for name in names if not name.endswith(REBUILT)]
        yield from ((n, Layout(tuple(p.shape))) for n in names if (p := own.get(n)) is not None)
    elif "experts" in type(module).__name__.lower():
        stacks = {n: p for n, p in own.items() if p.dim() == 3}
        yield from ((n, Layout(tuple(p.shape), _outputs_of(module, n))) for n, p in stacks.items())


def _outputs_of(experts: nn.Module, name: str) -> int:
    """Return the axis of the outputs of a stack of experts' matrices: -2, as in a Linear, or -1, as bmm takes them.

    By what transformers says of its own (`is_transposed`), else by a bias beside it, else by its name: a
    `weight` is as in a Linear, all others as bmm takes them.
    """
    transposed = getattr(experts, "is_transposed", None)
    if isinstance(transposed, bool):
        return -1 if transposed else -2
    stack = experts._parameters[name]
    named = (f"{name}_bias", name.replace("weight", "bias"))
    bias = next((b for key in named if (b := experts._parameters.get(key)) is not None), None)
    if stack is not None and bias is not None and bias.dim() == 2:
        fit = [axis for axis in (-2, -1) if stack.shape[axis] == bias.shape[-1]]
        if len(fit) == 1:
            return fit[0]
    return -2 if name == "weight" else -1


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Return whether a layer is GPT-2's: a Linear whose weight is (in, out), known without its package."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )
