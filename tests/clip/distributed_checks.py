"""What two processes check together: clipping distributed tensors equals clipping the whole ones in one process.

Run by test_distributed.py; see tests/two_processes.py.
"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip, clip_gradients_


class Halve:
    """A rule of a user's own."""

    def init(self):
        return {}

    def plan(self, grads, params, state):
        return None, state

    def clip(self, grad, param, plan):
        return grad / 2


RULES = [
    Halve(),
    Value(0.3),
    Norm(0.5),
    Norm(0.5, 3.0),
    Norm(0.5, "inf"),
    Norm(0.5, scope="tensor"),
    Norm(0.5, scope="group"),
    AGC(0.02),
    AutoClip(40),
    ZClip(z=0.5, warmup=1, max_norm=0.7),
    AdaGC(ratio=0.8, warmup=1, max_norm=0.5),
    Indicator(0.4),
]
TRAINING = [
    Value(0.3),
    Norm(0.5),
    AGC(0.02),
    AdaGC(ratio=0.8, warmup=1, max_norm=0.5),
    Indicator(0.4),
]
# Rows that two processes cannot share equally, one row for two processes, columns, copies, no shard at all.
LAYOUTS = [
    ((5, 4), [Shard(0)]),
    ((1, 6), [Shard(0)]),
    ((3, 7), [Shard(1)]),
    ((4, 3, 2), [Shard(2)]),
    ((7,), [Shard(0)]),
    ((4, 4), [Replicate()]),
    ((), [Replicate()]),
    ((3, 3), None),
    ((6,), None),
]


def mesh():
    return init_device_mesh("cpu", (2,))


def whole_params(seed, layouts=LAYOUTS):
    """Return the same parameters with gradients on every process."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape, _ in layouts:
        params.append(nn.Parameter(torch.randn(shape, generator=generator)))
        params[-1].grad = torch.randn(shape, generator=generator)
    return params


def spread(params, layouts=LAYOUTS):
    """Return copies of the parameters and gradients, distributed as their layout says; None leaves one plain."""
    result, over = [], mesh()
    for param, (_, placements) in zip(params, layouts, strict=True):
        if placements is None:
            copy = nn.Parameter(param.detach().clone())
            copy.grad = param.grad.clone()
        else:
            copy = nn.Parameter(distribute_tensor(param.detach().clone(), over, placements))
            copy.grad = distribute_tensor(param.grad.clone(), over, placements)
        result.append(copy)
    return result


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(ours, theirs, record, reference, note):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            full(a.grad), b.grad, rtol=1e-5, atol=1e-6, msg=lambda m: f"{note}: {m}"
        )
    assert record.clipped == reference.clipped, note
    for name in ("grad_norm", "grad_norm_clipped", "nonzero_share"):
        a, b = getattr(record, name), getattr(reference, name)
        assert (a is None and b is None) or math.isclose(a, b, rel_tol=1e-5), (note, name, a, b)
    if reference.norms is not None:
        torch.testing.assert_close(
            record.norms.double(), reference.norms.double(), rtol=1e-5, atol=1e-6
        )
    if reference.norms_clipped is not None:
        torch.testing.assert_close(
            record.norms_clipped.double(), reference.norms_clipped.double(), rtol=1e-5, atol=1e-6
        )


def check_every_rule_on_uneven_shards_columns_copies_and_plain_tensors():
    for rule in RULES:
        for settings in ({"on_nonfinite": "skip", "measure": True}, {}):
            state, known = None, None
            for step in range(3):
                theirs = whole_params(step)
                ours = spread(theirs)
                record = clip_gradients_(ours, rule, state, **settings)
                reference = clip_gradients_(theirs, rule, known, **settings)
                assert_same(ours, theirs, record, reference, f"{rule} {settings} step {step}")
                state, known = record.state, reference.state


def check_nothing_to_clip_changes_no_bit():
    for rule in (Value(100.0), Norm(1e4), AGC(1e4), Norm(1e4, scope="tensor")):
        ours = spread(whole_params(0))
        before = [full(p.grad).clone() for p in ours]
        record = clip_gradients_(ours, rule, on_nonfinite="skip", measure=True)
        assert not record.clipped, rule
        assert all(torch.equal(full(p.grad), b) for p, b in zip(ours, before, strict=True)), rule


def check_a_gradient_of_partial_sums_is_added_up_first():
    over = mesh()
    for rule in RULES:
        whole = nn.Parameter(torch.ones(4, 3))
        whole.grad = torch.arange(12.0).view(4, 3) - 5
        parted = nn.Parameter(distribute_tensor(torch.ones(4, 3), over, [Replicate()]))
        share = whole.grad * (0.25 if dist.get_rank() == 0 else 0.75)
        parted.grad = DTensor.from_local(share, over, [Partial()])
        record = clip_gradients_([parted], rule, measure=True)
        reference = clip_gradients_([whole], rule, measure=True)
        assert_same([parted], [whole], record, reference, str(rule))


def damaged(value):
    """Return distributed parameters of which one has a bad element that only the last process holds."""
    params = whole_params(0)
    params[0].grad[-1, -1] = value
    return params, spread(params)


def check_what_is_not_finite_on_one_process_is_skipped_on_all():
    for rule in RULES:
        for value in (math.nan, math.inf):
            for measure in (True, False):
                _, ours = damaged(value)
                record = clip_gradients_(ours, rule, on_nonfinite="skip", measure=measure)
                assert record.skipped, (rule, value)
                assert record.nonfinite == ("0",), (rule, value, record.nonfinite)
                assert all(p.grad is None for p in ours)


def check_zero_and_raise_agree_on_all_processes():
    for rule in RULES:
        theirs, ours = damaged(math.inf)
        record = clip_gradients_(ours, rule, on_nonfinite="zero", measure=True)
        reference = clip_gradients_(theirs, rule, on_nonfinite="zero", measure=True)
        assert_same(ours, theirs, record, reference, str(rule))
        _, ours = damaged(math.nan)
        try:
            clip_gradients_(ours, rule, on_nonfinite="raise")
        except FloatingPointError as error:
            assert "gradients in 0:" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{rule} did not raise")


def check_squares_that_overflow_on_one_process_are_finite():
    over = mesh()
    whole = torch.tensor([3e30, 0.0, 0.0, 4e30])
    param = nn.Parameter(distribute_tensor(torch.ones(4), over, [Shard(0)]))
    param.grad = distribute_tensor(whole, over, [Shard(0)])
    record = clip_gradients_([param], Norm(1.0), on_nonfinite="raise")
    assert math.isclose(record.grad_norm, 5e30, rel_tol=1e-6)
    torch.testing.assert_close(full(param.grad), torch.tensor([0.6, 0.0, 0.0, 0.8]))


def check_two_mesh_dimensions():
    over = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    for rule in RULES:
        theirs = whole_params(1)[:1]
        ours = [
            nn.Parameter(distribute_tensor(theirs[0].detach().clone(), over, [Shard(0), Shard(1)]))
        ]
        ours[0].grad = distribute_tensor(theirs[0].grad.clone(), over, [Shard(0), Shard(1)])
        record = clip_gradients_(ours, rule, measure=True)
        reference = clip_gradients_(theirs, rule, measure=True)
        assert_same(ours, theirs, record, reference, str(rule))


def check_a_step_of_fsdp2_takes_as_few_collectives_as_there_can_be():
    calls = []
    plain = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    # Norms travel once. Where rules clip on the way, what they found travels with the norms; AGC's units before that.
    expected = {
        Norm(0.5): 1,
        Norm(1e4): 1,
        Norm(0.5, scope="tensor"): 1,
        Value(0.3): 1,
        AGC(0.02): 2,
    }
    expected |= {Value(1e4): 1, AutoClip(40): 1, ZClip(): 1, AdaGC(): 1, Indicator(0.4): 2}
    for rule, count in expected.items():
        model = net()
        fully_shard(model[0], mesh=mesh())
        fully_shard(model, mesh=mesh())
        model(batch(0)).square().mean().mul(50).backward()
        calls.clear()
        dist.all_reduce = counted
        try:
            record = clip_gradients_(model, rule, on_nonfinite="skip", measure=True)
        finally:
            dist.all_reduce = plain
        assert len(calls) == count, (rule, len(calls))
        assert record.grad_norm > 0
        figures = (
            record.norms,
            record.norms_clipped,
        )  # the same on all processes, without another collective
        assert len(calls) == count, (rule, figures)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 6, generator=generator)


def train_alone(rule):
    """Train on whole batches in one process, and return the weights."""
    model, state = net(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).square().mean().mul(50).backward()
        state = clip_gradients_(model.parameters(), rule, state, on_nonfinite="skip").state
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def train_together(model, rule):
    """Train on this process's half of each batch, and return the weights."""
    optimizer, state, rank = torch.optim.AdamW(model.parameters(), lr=0.05), None, dist.get_rank()
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)[2 * rank : 2 * rank + 2]).square().mean().mul(50).backward()
        state = clip_gradients_(model.parameters(), rule, state, on_nonfinite="skip").state
        optimizer.step()
    return [full(p.detach()) for p in model.parameters()]


def check_ddp_trains_as_one_process():
    for rule in TRAINING:
        for a, b in zip(
            train_together(DistributedDataParallel(net()), rule), train_alone(rule), strict=True
        ):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda m, r=rule: f"{r}: {m}"
            )


def check_fsdp2_trains_as_one_process():
    for rule in TRAINING:
        model = net()
        fully_shard(model[0], mesh=mesh())  # layers of 5 and 3 rows: no even shards
        fully_shard(model, mesh=mesh())
        for a, b in zip(train_together(model, rule), train_alone(rule), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda m, r=rule: f"{r}: {m}"
            )


def check_fsdp2_beside_plain_parameters_trains_as_one_process():
    for rule in TRAINING:
        model = net()
        fully_shard(model[0], mesh=mesh())
        # The rest stays plain, and its gradients are averaged by hand.
        for param in [*model[2].parameters(), *model[3].parameters()]:
            param.register_post_accumulate_grad_hook(average)
        for a, b in zip(train_together(model, rule), train_alone(rule), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda m, r=rule: f"{r}: {m}"
            )


def average(param):
    dist.all_reduce(param.grad)
    param.grad /= dist.get_world_size()
