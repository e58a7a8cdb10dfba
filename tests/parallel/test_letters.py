"""The letters R, I, V and P of each region function, layer and parameter, held against spmd-types.

spmd-types (Meta) infers letters through torch's operations and refuses those that do not go
together. It runs here in one process, in a group that sends nothing: what a tensor holds is not
looked at, only what it is. Letters are read from where they stand for readers, the docstrings.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from ranks import run_ranks
from spmd_types.checker import typecheck
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rosetrainer import models
from rosetrainer.config import GPTConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.encoder_decoder import EncoderDecoderModel
from rosetrainer.models.layers import _SquaredReLU
from rosetrainer.models.llama import HeadNorm
from rosetrainer.models.relative_bias import RelativeBias
from rosetrainer.models.t5 import T5
from rosetrainer.parallel import comm, overlap, vocab_parallel
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Dropout, DropoutSeed
from rosetrainer.parallel.sharding import init_weights, shard_spec
from rosetrainer.parallel.shared_heads import KeyValueLinear
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear

DUAL = {"I": "I", "R": "P", "P": "R", "V": "V"}
"""The letter of a gradient, by that of its tensor."""

REGIONS: dict[Any, tuple[Any, str, str]] = {
    comm._Copy: (comm.copy_to_tensor_parallel_region, "I", "R"),
    comm._Reduce: (comm.reduce_from_tensor_parallel_region, "P", "I"),
    comm._Gather: (comm.gather_from_tensor_parallel_region, "V", "I"),
    comm._Scatter: (comm.scatter_to_tensor_parallel_region, "I", "V"),
    comm._GatherTokens: (comm.enter_tensor_parallel_region, "V", "R"),
    comm._ScatterTokens: (comm.leave_tensor_parallel_region, "P", "V"),
}
"""By autograd function, the region function that it belongs to, and the letters from and to."""

LAYERS: dict[Any, tuple[str, str]] = {
    ColumnParallelLinear: ("I", "V"),
    RowParallelLinear: ("V", "I"),
    KeyValueLinear: ("I", "V"),
    HeadNorm: ("V", "V"),
    RelativeBias: ("I", "V"),
}
"""What a layer takes and gives over tp where that is not the stream, twice: I, or V by tokens."""


def test_the_docstrings_say_the_letters() -> None:
    for region, source, target in REGIONS.values():
        said = " ".join((region.__doc__ or "").split())
        if region in (comm.enter_tensor_parallel_region, comm.leave_tensor_parallel_region):
            assert re.search(rf"\) {target}.*\) {source}|\) {source}.*\) {target}", said), said
        else:
            assert re.search(rf"{source} -> .*{target}\. ", said), said
    for layer, (source, target) in LAYERS.items():
        said = " ".join((layer.__doc__ or "").split())
        assert re.search(rf"\) {source} -> .*(\)|:) {target}\b", said), said
    stream = models.__doc__ or ""
    assert "over tp a layer takes and gives I unless it says otherwise, or V" in " ".join(
        stream.split()
    )


def start(sequence_parallel: bool, overlapped: bool) -> tuple[ParallelContext, Any]:
    """Two axes of two ranks, and their mesh, of which this process is all there is."""
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    how: dict[str, Any] = {"sequence_parallel": sequence_parallel, "overlap": overlapped}
    tp = Axis("tp", 2, 0, mesh.get_group("tp"), **how)
    return ParallelContext(tp, Axis("dp", 2, 0, mesh.get_group("dp"), divides_batch=True)), mesh


def letter_of(parameter: nn.Parameter, axis: Axis) -> str:
    spec = shard_spec(parameter)
    return "V" if spec.is_cut_over(axis) else "R" if spec.is_partial(axis) else "I"


def mark(tensor: Tensor, context: ParallelContext, tp: str, dp: str = "V") -> Tensor:
    """Says the tensor's letters, or asserts them where they are known."""
    kinds: Any = {context.tp.group: getattr(spmd, tp), context.dp.group: getattr(spmd, dp)}
    spmd.assert_type(tensor, kinds)
    return tensor


class Wrong(AssertionError):
    """A letter is another than was said, and spmd-types itself has not refused it."""


# Where a rank's own tokens are left uncollected, sizes do not go together.
COMPLAINTS = (AssertionError, spmd.SpmdTypeError, RuntimeError)


def found_letter(tensor: Tensor, axis: Axis) -> str:
    group: Any = axis.group
    return spmd.get_local_type(tensor)[spmd.normalize_axis(group)].name


def expect(what: str, tensor: Tensor, axis: Axis, letter: str) -> None:
    """Values alone do not tell R from I, nor, of a product, P from V."""
    found = found_letter(tensor, axis)
    if found != letter and {found, letter} not in ({"R", "I"}, {"V", "P"}):
        raise Wrong(f"{what} is {found}, not {letter}")


def become(tensor: Tensor, axis: Axis, letter: str) -> Tensor:
    """The tensor, with another letter from now on."""
    source, target = (getattr(spmd, name) for name in (found_letter(tensor, axis), letter))
    if source is not target:
        spmd.mutate_type(tensor, axis.group, src=source, dst=target)
    return tensor


RIGHT_LOSSES = vocab_parallel._cross_entropy_


class Primitives:
    """What the collectives do to letters, in their place. Of those calls one can be left out."""

    def __init__(self, patch: pytest.MonkeyPatch, left_out: int = -1) -> None:
        self.calls, self.left_out = 0, left_out
        for name in ("start_all_reduce", "start_all_gather", "start_reduce_scatter", "own_slice"):
            for module in (comm, overlap, vocab_parallel):
                if hasattr(module, name):
                    patch.setattr(module, name, getattr(self, name))

        patch.setattr(vocab_parallel, "_cross_entropy_", self.losses)

    def losses(self, logits: Tensor, *others: Any) -> Tensor:
        """Of a chunk: they are written into a slice, which spmd-types does not follow."""
        losses = RIGHT_LOSSES(logits, *others)
        expect("a chunk's losses", losses, others[-1], "I")
        return losses

    def is_left_out(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.left_out

    def start_all_reduce(
        self, x: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM
    ) -> comm.Pending:
        expect("what is summed", x, axis, "P")
        # Of a maximum only the value can be wrong: one of each rank's own would do for a letter.
        if op == dist.ReduceOp.MAX or not self.is_left_out():
            become(x, axis, "R")
        return comm.Pending(None, axis.ledger, lambda: x)

    def start_all_gather(self, x: Tensor, axis: Axis, phase: str, dim: int = -1) -> comm.Pending:
        expect("what is gathered", x, axis, "V")
        if not self.is_left_out():
            x = become(torch.cat([x.detach()] * axis.size, dim), axis, "R")
        return comm.Pending(None, axis.ledger, lambda: x)

    def start_reduce_scatter(
        self, x: Tensor, axis: Axis, phase: str, dim: int = -1
    ) -> comm.Pending:
        expect("what is summed", x, axis, "P")
        if not self.is_left_out():
            x = x.detach().chunk(axis.size, dim)[0]
        return comm.Pending(None, axis.ledger, lambda: x)

    def own_slice(self, x: Tensor, axis: Axis, dim: int = -1) -> Tensor:
        expect("what is cut", x, axis, "R")
        if not self.is_left_out():
            x = become(x.detach().chunk(axis.size, dim)[0].clone(), axis, "V")
        return x


def run_body(function: Any, inputs: list[Tensor], others: list[Any], axis: Axis, given: str) -> Any:
    """The gradients that the function's own code makes, forward and then backward."""
    ctx: Any = SimpleNamespace(mark_non_differentiable=lambda *_: None)
    ctx.needs_input_grad = [True] * (len(inputs) + len(others))

    def save(*tensors: Tensor) -> None:
        if function is vocab_parallel._LinearCrossEntropy:
            become(tensors[0], axis, "V")  # written by `out=` into a slice, which is not followed
        ctx.saved_tensors = tensors

    ctx.save_for_backward = save
    result = function.forward(ctx, *inputs, *others)
    y, *rest = result if isinstance(result, tuple) else (result,)
    expect("what it gives", y, axis, given)
    gradient = become(torch.ones_like(y), axis, DUAL[given].replace("P", "V"))
    return function.backward(ctx, gradient, *map(torch.zeros_like, rest))


def bodies(context: ParallelContext) -> Any:
    """(function, its tensors with their letters, its other inputs, the letter of what it gives)"""
    tp, stream = context.tp, "V" if context.tp.sequence_parallel else "I"
    x = (torch.ones(2, 4, 6), stream)
    weight, bias = (torch.ones(8, 6), "V"), (torch.ones(8), "V")
    for function, (_, source, target) in REGIONS.items():
        yield function, [(torch.ones(2, 4, 6), source)], [tp], target
    yield overlap._ColumnLinear, [x, weight, bias], [tp], "V"
    tokens = 4 * tp.size if tp.sequence_parallel else 4
    labels = (torch.zeros(2, tokens, dtype=torch.int64), "I"), (torch.ones(2, tokens), "I")
    yield vocab_parallel._LinearCrossEntropy, [x, weight, *labels], [13, tp, True], "I"


def run_once(context: ParallelContext, mesh: Any, body: Any, left_out: int = -1) -> int:
    """How many collectives it calls, of which one can be left out."""
    function, inputs, others, given = body
    copies = [tensor.clone() for tensor, _ in inputs]  # without a letter
    with pytest.MonkeyPatch.context() as patch, spmd.set_current_mesh(mesh), typecheck():
        primitives = Primitives(patch, left_out)
        for copy, (_, letter) in zip(copies, inputs, strict=True):
            mark(copy, context, letter.replace("P", "V"))
        gradients = run_body(function, copies, others, context.tp, given)
        for gradient, copy, (_, letter) in zip(gradients, copies, inputs, strict=False):
            if gradient is not None:
                expect("a gradient", gradient, context.tp, DUAL[letter])
                assert gradient.shape == copy.shape, "another size than the tensor's"
    return primitives.calls


def check_bodies(sequence_parallel: bool) -> dict[str, int]:
    """How many collectives each function has; without any one of them a letter is wrong."""
    context, mesh = start(sequence_parallel, True)
    found = {}
    for body in bodies(context):
        found[body[0].__name__] = calls = run_once(context, mesh, body)
        for left_out in range(calls):
            with pytest.raises(COMPLAINTS):
                run_once(context, mesh, body, left_out)
    return found


def test_a_collective_s_code_has_the_letters_that_are_said_and_needs_each_of_its_calls() -> None:
    for sequence_parallel in (False, True):
        (found,) = run_ranks(1, check_bodies, sequence_parallel)
        assert min(found.values()) == 1
        assert found["_ColumnLinear"] == (3 if sequence_parallel else 1)
        assert found["_LinearCrossEntropy"] == (3 if sequence_parallel else 2)


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tied": False, "dropout": 0.1},
    "rotary": {"architecture": "rotary", "tied": False},
    "llama": {"architecture": "llama", "bias": False, "n_kv_heads": 1, "qk_norm": True},
    "bert": {"architecture": "bert"},
    "t5": {"architecture": "t5", "bias": False},
    "encoder-decoder": {},
}


def model_of(name: str, context: ParallelContext) -> nn.Module:
    shape = {"vocab_size": 29, "context_length": 8, "n_layers": 1, "n_heads": 4, "d_model": 8}
    config = GPTConfig(**{**shape, **MODELS[name]})
    kind = EncoderDecoderModel if name == "encoder-decoder" else build_model
    model: nn.Module = kind(config, context).double()
    init_weights(model, 1)
    return model


def say_what_is_known(
    patch: pytest.MonkeyPatch, context: ParallelContext, used: set[Any], left_out: Any
) -> None:
    """To spmd-types, of our autograd functions: what the test of their code has shown."""

    def region(function: Any, source: str, target: str) -> Any:
        def typing(out: Tensor, *, x: Tensor, axis: Axis) -> None:
            used.add(function)
            if function is left_out:
                spmd.assert_type_like(out, x)
                return
            expect("what is taken", x, axis, source)
            taken: Any = {axis.group: getattr(spmd, found_letter(x, axis))}
            given: Any = {axis.group: getattr(spmd, target)}
            spmd.assert_type(x, taken)
            spmd.assert_type_like(out, x, given)

        return staticmethod(typing)

    def column(out: Tensor, *, x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis) -> None:
        mark(x, context, "V" if tp.sequence_parallel else "I")
        for own in (weight, bias):
            if own is not None:
                mark(own, context, "V", "R")
        mark(out, context, "V")

    def loss(out: Any, *, x: Any, weight: Any, labels: Any, loss_weights: Any, tp: Axis) -> None:
        mark(x, context, "V" if tp.sequence_parallel else "I")
        mark(weight, context, "V", "R")
        spmd.rules.ignore(labels, loss_weights)
        for one in out:
            mark(one, context, "I")

    def own_slice(x: Tensor, axis: Axis, dim: int = -1) -> Tensor:
        part = right_slice(x, axis, dim)
        return become(part, axis, "V") if spmd.has_local_type(part) else part

    right_slice = comm.own_slice
    patch.setattr(comm, "own_slice", own_slice)
    rules = {function: region(function, *letters) for function, (_, *letters) in REGIONS.items()}
    rules[overlap._ColumnLinear] = staticmethod(column)
    rules[vocab_parallel._LinearCrossEntropy] = staticmethod(loss)
    for function, rule in rules.items():
        patch.setattr(function, "spmd_typecheck", rule, raising=False)


def watch_layers(model: nn.Module, context: ParallelContext) -> None:
    """Each layer gives what is said of it."""
    stream = "V" if context.tp.sequence_parallel else "I"

    def given(layer: nn.Module, inputs: Any, output: Any) -> None:
        special = next((LAYERS[kind] for kind in type(layer).__mro__ if kind in LAYERS), None)
        if isinstance(layer, (Dropout, nn.Identity)) or not isinstance(output, Tensor):
            return
        letter = special[1].replace("I", stream) if special else stream
        expect(type(layer).__name__, output, context.tp, letter)

    for layer in model.modules():
        layer.register_forward_hook(given)


def run_model(name: str, context: ParallelContext, mesh: Any, left_out: Any = None) -> set[Any]:
    """The region functions that the model has gone through."""
    used: set[Any] = set()
    model, ids = model_of(name, context), torch.arange(16).view(2, 8)
    ones = torch.ones_like(ids)
    with pytest.MonkeyPatch.context() as patch, spmd.set_current_mesh(mesh), typecheck():
        say_what_is_known(patch, context, used, left_out)
        watch_layers(model, context)
        for parameter in model.parameters():
            letters = [letter_of(parameter, axis) for axis in (context.tp, context.dp)]
            mark(parameter, context, *letters)
        mark(ids, context, "I")
        mark(ones, context, "I")
        if isinstance(model, T5):
            logits, loss = model(ids, ones, ids, labels=ids, seed=DropoutSeed(1, 1))
        elif isinstance(model, EncoderDecoderModel):
            logits, loss = model(ids, ids, ones, ones, labels=ids, seed=DropoutSeed(1, 1))
        else:
            logits, loss = model(ids, labels=ids, seed=DropoutSeed(1, 1))
        for what, tensor in (("logits", logits), ("loss", loss)):
            expect(what, tensor, context.tp, "I")
            expect(what, tensor, context.dp, "V")
    return used


def check_models(sequence_parallel: bool, overlapped: bool) -> None:
    context, mesh = start(sequence_parallel, overlapped)
    spmd.register_local_autograd_function(_SquaredReLU)
    for name in MODELS:
        used = run_model(name, context, mesh)
        assert used
        for function in used:
            with pytest.raises(COMPLAINTS):
                run_model(name, context, mesh, left_out=function)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_model_has_the_letters_that_are_said_and_needs_each_of_its_regions(
    sequence_parallel: bool, overlapped: bool
) -> None:
    run_ranks(1, check_models, sequence_parallel, overlapped)
