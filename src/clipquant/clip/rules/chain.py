"""The rule that is several rules, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.plan import Plan, plan_of
from clipquant.clip.rule import Rule, State
from clipquant.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True, init=False)
class Chain(Rule):
    """Clip by several rules, one after the other: each sees what the one before it left.

    `clip_gradients_` and the callback carry the rules out one by one, in place; a last rule that scales all gradients
    alike is folded into a fused optimizer's step, as it is alone.

    Args:
        rules: The rules in order, as a list (in a YAML file) or one by one.

    Raises:
        TypeError: One of them is no rule.
        ValueError: There is none.

    Example:
        >>> from clipquant.clip import AGC, Norm
        >>> Chain(AGC(0.01), Norm(1.0)) == Chain([AGC(0.01), Norm(1.0)])
        True
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: list[Rule] | Rule, *more: Rule) -> None:
        given = (*rules, *more) if isinstance(rules, (list, tuple)) else (rules, *more)
        if not given:
            raise ArgumentError(
                "Chain: rules must hold a rule, got none: give e.g. AGC(0.01), Norm(1.0)"
            )
        for rule in given:
            if not isinstance(rule, Rule):
                raise ArgumentTypeError(
                    f"Chain: rules must be rules, got {rule!r}: give e.g. AGC(0.01), Norm(1.0); a number c is Value(c)"
                )
        flat = [r for rule in given for r in (rule.rules if isinstance(rule, Chain) else (rule,))]
        object.__setattr__(self, "rules", tuple(flat))

    @property
    def folds(self) -> bool:
        """Whether the last rule is one coefficient for all gradients, which an optimizer can apply inside its step."""
        return bool(getattr(self.rules[-1], "folds", False))

    @property
    def order(self) -> float:
        """Order of the norm that the last rule reads anyway."""
        return float(getattr(self.rules[-1], "order", 2.0))

    def init(self) -> State:
        return {
            f"{i}.{key}": value
            for i, rule in enumerate(self.rules)
            for key, value in rule.init().items()
        }

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[tuple[Plan, ...], State]:
        plans: list[Plan] = []
        following: State = {}
        for i, rule in enumerate(self.rules):
            own = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")}
            decision, own = rule.plan(grads, params, own)
            plans.append(plan_of(rule, decision))
            following |= {f"{i}.{key}": value for key, value in own.items()}
            if i + 1 < len(self.rules):
                clipped = [
                    plans[-1].clip(g, p).detach() for g, p in zip(grads, params, strict=True)
                ]
                grads = Gradients(clipped, grads.groups, grads.positions, grads.loss_scale)
        return tuple(plans), following

    def clip(self, grad: Tensor, param: Tensor, plan: tuple[Plan, ...]) -> Tensor:
        for each in plan:
            grad = each.clip(grad, param)
        return grad
