"""A traced network cut at its taps into parts that run one after another."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn


class Tap(NamedTuple):
    """A layer's output in a traced network.

    Attributes:
        node: the output.
        returned: the last node that had run when the layer returned it.
        channels_last: whether it is a map whose channels come last.
        changed: whether it is changed in place after it was returned.
    """

    node: fx.Node
    returned: fx.Node
    channels_last: bool
    changed: bool = False


class Cut(NamedTuple):
    """A stretch of a traced network between two taps.

    Attributes:
        run: of (what holds the modules and parameters by their names, the tensor before it), to the one after it.
        modules: names of the modules it calls.
        tensors: names of the parameters and buffers it reads itself.
    """

    run: Callable[[nn.Module, Tensor], Any]
    modules: tuple[str, ...]
    tensors: tuple[str, ...]


class TappedPart(nn.Module):
    """A part of a network, of that network's own modules and parameters, under the same names.

    It runs what was traced in train mode where it is in train mode, else what was traced in eval mode.
    """

    def __init__(self, network: nn.Module, train_cut: Cut, eval_cut: Cut, training: bool):
        super().__init__()
        self.training = training  # of itself alone: what it holds may be in modes of its own
        self._train_run, self._eval_run = train_cut.run, eval_cut.run
        for name in sorted({*train_cut.modules, *eval_cut.modules}):  # a module before those inside it
            self._hold(name, network.get_submodule(name))
        tensors = sorted({*train_cut.tensors, *eval_cut.tensors})
        self._own = tuple(name for name in tensors if self._hold(name, _attribute(network, name)))

    def forward(self, x: Tensor) -> Any:  # as the tap before it, [batch, channels, height, width] or [batch, ...]
        return (self._train_run if self.training else self._eval_run)(self, x)

    def follow(self, network: nn.Module) -> None:
        """Take the tensors that no module here holds from the network, which has moved to a device or dtype."""
        for name in self._own:
            path, _, last = name.rpartition(".")
            setattr(self.get_submodule(path), last, _attribute(network, name))

    def _hold(self, name: str, value: nn.Module | Tensor) -> bool:
        """Hold it under this name; False where a module that is held already has it."""
        *path, last = name.split(".")
        scope: nn.Module = self
        for step in path:
            if step not in scope._modules:
                scope.add_module(step, _Scope())
            scope = scope._modules[step]
            if not isinstance(scope, _Scope):
                return False
        if isinstance(value, nn.Module):
            scope.add_module(last, value)
        elif isinstance(value, nn.Parameter):
            scope.register_parameter(last, value)
        else:
            scope.register_buffer(last, value, persistent=False)
        return True


class _Scope(nn.Module):
    """What gives the modules inside it their names."""


def cuts(graph: fx.Graph, layers: Sequence[str], taps: Sequence[Tap]) -> list[Cut]:
    """The stretches up to each tap, and the one from the last tap to the network's end.

    They follow the order in which the nodes ran, not what depends on what: work in place belongs to where it was done.

    Args:
        graph: of the whole network, with one input.
        layers: names of the taps.
        taps: in the same order.

    Raises:
        ValueError: where the taps do not run in this order, or a stretch reads anything but the tap before it.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    ends = [place[tap.returned] + 1 for tap in taps]
    for before, after, first, second in zip(ends, ends[1:], layers, layers[1:], strict=False):
        if before >= after:
            raise ValueError(f"parts() needs layers in the order in which they run; {second!r} ends before {first!r}.")
    found = []
    for i, (begin, end) in enumerate(zip([0, *ends], [*ends, len(nodes)], strict=True)):
        before, after = taps[i - 1] if i else None, taps[i] if i < len(taps) else None
        try:
            found.append(_cut(nodes[begin:end], before, after))
        except _Missing as missing:
            raise ValueError(
                f"What follows the layer {layers[i - 1]!r} reads more than its output ({missing} too), so the network "
                "has no parts that run one after another there; tap layers that everything passes through."
            ) from None
    return found


def check_apart(parts: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Raise where two parts share a parameter or a buffer, as one alone could not be frozen."""
    owner: dict[int, int] = {}
    for i, part in enumerate(parts):
        for name, tensor in _tensors(part):
            if owner.setdefault(id(tensor), i) != i:
                raise ValueError(
                    f"{name.removeprefix('model.')} is used by {names[owner[id(tensor)]]} and by {names[i]}, so they "
                    "are no parts that could be trained apart; tap other layers."
                )


def function_of(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Any]:
    """The graph as a function whose first argument holds the modules and parameters."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<traced network>", "exec"), names)
    return names["forward"]


class _Missing(Exception):
    """Of the name of a value from an earlier part."""


def _cut(nodes: Sequence[fx.Node], before: Tap | None, after: Tap | None) -> Cut:
    graph, modules, tensors = fx.Graph(), [], []
    made: dict[fx.Node, fx.Node] = {}
    if before is not None:
        x = graph.placeholder("feature")
        if before.channels_last:  # a Tapped returns it with its channels in front
            x = graph.call_method("permute", (x, 0, 2, 3, 1))
        made[before.node] = graph.call_method("clone", (x,)) if before.changed else x

    def here(node: fx.Node) -> fx.Node:
        if node not in made:
            if node.op != "get_attr":
                raise _Missing(node.name.removeprefix("model_"))
            tensors.append(node.target)
            made[node] = graph.node_copy(node)
        return made[node]

    for node in nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], here))
        elif node.op != "get_attr":
            made[node] = graph.node_copy(node, here)
            if node.op == "call_module":
                modules.append(node.target)
    if after is not None:
        x = here(after.node)
        graph.output(graph.call_method("permute", (x, 0, 3, 1, 2)) if after.channels_last else x)
    return Cut(function_of(graph), tuple(dict.fromkeys(modules)), tuple(tensors))


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from ((name, buffer) for name, buffer in part.named_buffers() if not name.startswith("_tensor_constant"))


def _attribute(network: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(network.get_submodule(path), last)
