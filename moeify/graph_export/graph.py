"""`export(model)`: the whole rewritten model as one `torch.fx.GraphModule`.

torch.export traces the model once, without guards and with dynamic sizes; moeify's ops are single
nodes in the graph: gate, assign, combine_weights, dispatch, grouped_linear, combine.
"""

from __future__ import annotations

import functools
import logging
import operator
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify import compat
from moeify.capture.capture import ExampleInputs, split_inputs
from moeify.capture.torch_calls import tensors_in
from moeify.errors import CaptureError
from moeify.graph_export.graph_pickle import StoredNode, dump_nodes, load_nodes
from moeify.hf import detect
from moeify.kernels import experts as _experts  # noqa: F401  registers ops that graphs call
from moeify.kernels import route
from moeify.nn.router import Router
from moeify.nn.router_losses import RouterLosses
from moeify.sites.record import require_one_process, routers_of
from moeify.train import losses

__all__ = ["ExportedModule", "export"]

log = logging.getLogger("moeify")

_AUX, _Z = 4, 5  # positions of the losses in what `moeify::gate` returns


class ExportedModule(fx.GraphModule):
    """A graph module that is pickled node by node, with the structure of arguments and results.

    torch pickles a graph as code and traces that again, which loses that structure and fails where
    a size is computed. Of `node.meta`, only the module stack is kept.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        own = {key: self.__dict__[key] for key in ("_parameters", "_buffers", "_modules")}
        # As bytes, because torch warns about one of its own classes when it is unpickled.
        structure = pickle.dumps(compat.call_structure(self.graph))
        nodes = list(dump_nodes(self.graph))
        return _unpickled, (own, nodes, structure, dict(self.meta), self.training)


def _unpickled(
    own: dict[str, Any],
    nodes: list[StoredNode],
    structure: bytes,
    meta: dict[str, Any],
    training: bool,
) -> ExportedModule:
    root = nn.Module()
    root.__dict__.update(own)
    graph = load_nodes(nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compat.set_call_structure(graph, pickle.loads(structure))
    made = ExportedModule(root, graph, class_name="ExportedModule")
    made.meta.update(meta)
    made.training = training
    return made


def export(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, dynamic: bool = True
) -> fx.GraphModule:
    """Return the whole model as one graph that runs at other sizes, trains, pickles and compiles.

    The graph is open to passes: change `gm.graph`, then `gm.recompile()`. moeify's ops are the
    nodes `torch.ops.moeify.{gate,assign,combine_weights,dispatch,grouped_linear,combine}.default`.

    The mode of the model, training or evaluation, is part of the graph: dropout, capacity, dropping
    and noise are those of that mode, whatever `gm.train()` or `gm.eval()` sets later;
    `gm.meta["training"]` records it. So are the casts of autocast in moeify's ops: export inside
    the `torch.autocast` that the graph will run in.

    The parameters are the model's own objects: training one trains the other. Read the router
    losses of the last forward with `moeify.aux_loss(gm)`; if a Hugging Face model returns a loss in
    training, it includes them.

    Args:
        model: Any module, converted or not; it is not changed.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or a tensor; made
            from the config of a Hugging Face model if None. The graph is called with the same
            arguments. A Hugging Face model runs without a cache unless `use_cache` is given.
        dynamic: Keep all input sizes dynamic that the model does not fix. The example needs sizes
            of 2 or more there, because torch.export fixes a size of 1.

    Returns:
        The graph, as a `torch.fx.GraphModule` that returns what the model returns.

    Raises:
        CaptureError: The model cannot be traced, or its batch size is fixed and `dynamic` is set.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> gm = export(nn.Sequential(mlp, nn.LayerNorm(8)), torch.randn(4, 8))
        >>> gm(torch.randn(7, 8)).shape
        torch.Size([7, 8])
    """
    require_one_process(model, "export")
    made = detect.example_inputs_for(model) if detect.is_hf(model) or example_inputs is None else {}
    constants = {name: v for name, v in made.items() if not isinstance(v, Tensor)}
    if example_inputs is None:
        example_inputs = {name: v for name, v in made.items() if name not in constants}
    args, kwargs = _distinct(split_inputs(example_inputs), set())
    constants = {name: value for name, value in constants.items() if name not in kwargs}
    called = _view(model, constants)
    shapes: Any = _every_size(args, kwargs) if dynamic else None
    try:
        with _recording(called):
            program = torch.export.export(called, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise CaptureError(
            f"torch.export cannot trace this {type(model).__name__}: {type(error).__name__}: "
            f"{line}; its full message is the cause of this error"
        ) from error
    if dynamic:
        _check_dynamic(program)
    raw = compat.program_module(program)
    _use_plain_bounds(raw.graph)
    _add_router_losses(raw, model)
    gm = ExportedModule(raw, raw.graph, class_name="ExportedModule")
    gm.meta["training"] = gm.training = model.training
    return gm


def _view(model: nn.Module, constants: Mapping[str, Any]) -> nn.Module:
    """Return the model as another object whose forward has the constants and adds router losses."""
    adds_losses = isinstance(model.__dict__.get("forward"), losses.ForwardWithRouterLosses)
    if not constants and not adds_losses:
        return model
    own = functools.partial(model.forward, **constants)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if not (adds_losses and model.training):
            return output
        return losses.with_router_losses(model, output, kwargs.get("labels") is not None)

    view: nn.Module = type(model).__new__(type(model))
    view.__dict__.update(model.__dict__)
    view.__dict__["forward"] = forward
    return view


def _distinct(value: Any, seen: set[int]) -> Any:
    """Replace repeated tensors by views: the graph would make one input of them."""
    if isinstance(value, Tensor):
        if id(value) in seen:
            return value.detach()
        seen.add(id(value))
        return value
    if type(value) in (list, tuple):
        return type(value)(_distinct(part, seen) for part in value)
    if type(value) is dict:
        return {key: _distinct(part, seen) for key, part in value.items()}
    return value


def _every_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the request that every size of every tensor stay dynamic."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in tensors_in((args, kwargs)):
        shapes[tensor] = dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO)
    return shapes


@contextmanager
def _recording(model: nn.Module) -> Iterator[None]:
    """Let routers record their losses and move their biases while the model is traced.

    They do not under torch.export, but what adds the losses to a Hugging Face loss must find them
    as part of the graph. The model is left as it was.
    """
    routers = [router for _, router in routers_of(model)]
    former = [router.last_aux_loss for router in routers]

    def record(router: nn.Module, args: Any, routing: route.Routing) -> None:
        assert isinstance(router, Router)
        loss = router.aux_loss * routing.aux_loss + router.z_loss * routing.z_loss
        last = router.last_aux_loss
        router.last_aux_loss = loss if last is None else last + loss

    def move_biases(*_: Any) -> None:
        for router in routers:
            if model.training and not router.lift_capacity:
                router.update_bias()

    def forget(*_: Any) -> None:
        for router in routers:
            router.last_aux_loss = None

    forget()
    hooks = [router.register_forward_hook(record) for router in routers]
    hooks.append(model.register_forward_pre_hook(move_biases))
    hooks.append(model.register_forward_hook(forget))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for router, loss in zip(routers, former, strict=True):
            router.last_aux_loss = loss


def _check_dynamic(program: torch.export.ExportedProgram) -> None:
    """Raise a CaptureError if the batch size was fixed; log other sizes that were."""
    names = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    inputs = {n.name: n.meta["val"] for n in nodes if isinstance(n.meta.get("val"), Tensor)}
    inputs = {name: value for name, value in inputs.items() if value.dim()}
    fixed = {
        name: {dim: int(size) for dim, size in enumerate(value.shape) if isinstance(size, int)}
        for name, value in inputs.items()
    }
    if inputs and all(0 in dims for dims in fixed.values()):
        name, dims = next(iter(fixed.items()))
        why = (
            "torch.export fixes a size of 1: use an example with 2 or more there"
            if dims[0] == 1
            else "the model's own code fixes it"
        )
        raise CaptureError(
            f"{name}: dim 0 would stay {dims[0]} in the graph ({why}), "
            "or export with dynamic=False for fixed sizes"
        )
    for name, dims in fixed.items():
        logged = {d: s for d, s in dims.items() if d == 0 or not inputs[name].is_floating_point()}
        if logged:
            what = ", ".join(f"dim {dim} = {size}" for dim, size in logged.items())
            log.warning("export: %s keeps fixed sizes: %s", name, what)


def larger(a: int | torch.SymInt, b: int | torch.SymInt) -> Any:
    """Return the larger size; stands for `torch.sym_max` in the graph."""
    if isinstance(a, int) and isinstance(b, int):  # so dynamo sees every size
        return max(a, b)
    return torch.sym_max(a, b)  # type: ignore[no-untyped-call]


def smaller(a: int | torch.SymInt, b: int | torch.SymInt) -> Any:
    """Return the smaller size; stands for `torch.sym_min` in the graph."""
    if isinstance(a, int) and isinstance(b, int):  # so dynamo sees every size
        return min(a, b)
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call]


def _use_plain_bounds(graph: fx.Graph) -> None:
    """Replace calls that dynamo of torch 2.11 refuses if the sizes are plain numbers."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (torch.sym_max, torch.sym_min):
            node.target = larger if node.target is torch.sym_max else smaller


def _add_router_losses(gm: fx.GraphModule, model: nn.Module) -> None:
    """Collect the losses of all gates in one leaf module, from which `aux_loss` reads them."""
    routers = {id(router.weight): router for _, router in routers_of(model)}
    found: list[tuple[fx.Node, Router]] = []
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.moeify.gate.default):
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            router = routers.get(id(operator.attrgetter(str(weight.target))(gm)))
            if router is not None:
                found.append((node, router))
    if not found:
        return
    name = "router_losses"
    while hasattr(gm, name):
        name += "_"
    gm.add_submodule(name, RouterLosses([(r.aux_loss, r.z_loss) for _, r in found]))
    parts: list[fx.Node] = []
    for gate, _ in found:
        with gm.graph.inserting_after(gate):
            parts += [gm.graph.call_function(operator.getitem, (gate, i)) for i in (_AUX, _Z)]
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_module(name, tuple(parts))
    gm.graph.lint()
