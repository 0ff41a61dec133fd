"""Residual blocks without some of their branches: traced, and the sums without what the branches bring to them.

A branch whose last layer is scaled by 0 adds 0 to its shortcut. Here it does not run: of the traced block (`torch.fx`)
the sum is replaced by the shortcut, and what only the branch needed is gone. The network is not changed: for one pass
the blocks' forward is what was traced, on their own modules and parameters.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import relu

from kdfast.models.tapped import LayerTracer
from kdfast.models.tapped_parts import function_of

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# what a 0 passes as a 0
PASSED_MODULES = ("Identity", "Dropout", "DropPath", "StochasticDepth", "LayerScale", "LayerScale2d")
PASSED_CALLS = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", operator.getitem, torch.roll, torch.flatten,
}  # fmt: skip
NEW = {operator.add, torch.add, torch.relu, relu}  # what makes a tensor of its own
MOST = 4  # branches of a block: each set of them has a trace of its own
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class LeftOut:
    """A network's blocks without residual branches.

    Args:
        branches: names of the last layers of all the network's residual branches.
    """

    def __init__(self, branches: Sequence[str]):
        self.branches = tuple(branches)
        self._blocks: dict[str, str | None] = {}  # of each branch its block, None where it cannot be left out
        self._runs: dict[tuple, tuple[nn.Module, Callable] | None] = {}  # what was traced and what runs it
        self._checked: set[tuple] = set()

    @contextmanager
    def __call__(self, network: nn.Module, branches: Sequence[str]) -> Iterator[None]:
        """Within, the network's blocks do not run these branches; those that cannot be left out run all the same.

        The branches' last layers must have been scaled by 0: by that each trace is checked when it first runs.
        """
        by_block: dict[str, list[str]] = {}
        for branch in branches:
            block = self._block(network, branch)
            if block is not None:
                by_block.setdefault(block, []).append(branch)
        # all are traced as they are before any of them is changed
        forwards = [(network.get_submodule(name), self._forward(network, name, out)) for name, out in by_block.items()]
        before = [(block, block.__dict__.get("forward")) for block, _ in forwards]
        try:
            for block, forward in forwards:
                block.forward = forward
            yield
        finally:
            for block, forward in before:
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _forward(self, network: nn.Module, name: str, branches: Sequence[str]) -> Callable:
        block = network.get_submodule(name)
        plain, like = block.forward, next(block.parameters())
        key = (like.device, like.dtype, *branches)  # constants of the trace do not move along
        if key not in self._runs:
            self._runs[key] = _without(network, name, branches)

        def forward(*args, **kwargs):
            found = self._runs[key]
            if found is None or kwargs or len(args) != 1:  # only the first argument was traced
                return plain(*args, **kwargs)
            if key not in self._checked:
                self._checked.add(key)
                if not _same(block, plain, found, *args):
                    self._runs[key] = None
                    return plain(*args)
            return _run(found, *args)

        return forward

    def _block(self, network: nn.Module, branch: str) -> str | None:
        """The smallest module around the branch that holds its sum too."""
        if branch not in self._blocks:
            parents = branch.split(".")[:-1]
            names = [".".join(parents[:i]) for i in range(len(parents), 0, -1)]
            block = next((n for n in names if _without(network, n, [branch]) is not None), None)
            many = block is not None and sum(b.startswith(f"{block}.") for b in self.branches) > MOST
            self._blocks[branch] = None if many else block
        return self._blocks[branch]


def _run(found: tuple[nn.Module, Callable], x: Tensor) -> Any:
    root, run = found
    return run(root, x)


def _same(block: nn.Module, plain: Callable, found: tuple[nn.Module, Callable], x: Tensor) -> bool:
    """Whether it gives what the block gives: in eval mode, in which nothing is drawn and no statistics move."""
    modes = [(module, module.training) for module in block.modules()]
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            block.eval()
            expected, got = plain(x.clone()), _run(found, x.clone())
    finally:
        for module, training in modes:
            module.training = training
    alike = isinstance(expected, Tensor) and (expected.shape, expected.dtype) == (got.shape, got.dtype)
    return alike and torch.allclose(got, expected, equal_nan=True)


def _without(network: nn.Module, block: str, branches: Sequence[str]) -> tuple[nn.Module, Callable] | None:
    """The block without these branches, as a function of (what holds it, its input); None where there is none."""
    root = nn.Sequential(OrderedDict(model=network.get_submodule(block)))
    tracer = LayerTracer(root)
    try:
        graph = tracer.trace(root)
    except Exception:  # torch.fx raises what the traced code raises
        return None
    before = _needed(graph)
    for branch in branches:
        output, _ = tracer.outputs.get(network.get_submodule(branch), (None, None))
        found = _sum_of(output.node, root) if isinstance(output, fx.Proxy) else None
        if found is None:
            return None
        total, shortcut = found
        if not all(_makes_its_own(user, root) for user in total.users):
            with graph.inserting_before(total):
                shortcut = graph.call_method("clone", (shortcut,))
        total.replace_all_uses_with(shortcut)
    needed = _needed(graph)
    for node in reversed(list(graph.nodes)):
        if node in needed or node.op == "placeholder":
            continue
        changed = _changed(node, root)
        if changed is not None and (node not in before or changed in needed or changed.op == "placeholder"):
            return None  # work in place on what stays
        graph.erase_node(node)
    constants = (node.target for node in graph.nodes if node.op == "get_attr" and hasattr(root, node.target))
    if any(getattr(root, name).is_floating_point() for name in constants):
        return None  # perhaps made of a buffer that changes
    return root, function_of(graph)


def _sum_of(node: fx.Node, root: nn.Module) -> tuple[fx.Node, fx.Node] | None:
    """The sum that the branch's last output goes to, and its other term."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in SUMS and user.op != "call_module" and len(user.args) == 2 and not user.kwargs:
            other = user.args[0] if user.args[1] is node else user.args[1]
            alone = isinstance(other, fx.Node) and other is not node and node not in _needed_by(other)
            return (user, other) if alone else None
        if user.op == "call_module":
            passes = type(root.get_submodule(user.target)).__name__ in PASSED_MODULES
        else:
            passes = user.target in PASSED_CALLS and user.args[0] is node
        if not passes:
            return None
        node = user
    return None


def _needed(graph: fx.Graph) -> set[fx.Node]:
    (end,) = (node for node in graph.nodes if node.op == "output")
    return _needed_by(end)


def _needed_by(end: fx.Node) -> set[fx.Node]:
    needed, left = set(), [end]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    return needed


def _changed(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """What the node works on in place, None if nothing."""
    if node.op == "call_module":
        in_place = getattr(root.get_submodule(node.target), "inplace", False)
    elif node.op == "call_method":
        in_place = node.target.endswith("_")
    else:
        in_place = node.target in IN_PLACE or node.kwargs.get("inplace", False)
    if not in_place:
        return None
    changed = node.args[0]
    while changed.op == "call_module" and isinstance(root.get_submodule(changed.target), nn.Identity):
        changed = changed.args[0]
    return changed


def _makes_its_own(node: fx.Node, root: nn.Module) -> bool:
    """Whether it neither changes nor hands on what it is given."""
    if node.op == "call_module":
        known = type(root.get_submodule(node.target)).__name__ not in PASSED_MODULES
    else:
        known = node.op == "call_function" and node.target in NEW
    return known and _changed(node, root) is None
