"""Any torchvision or timm network as one that returns the outputs of its layers, by their names."""

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

SIZE = 224  # of the image a network is measured with where it names no other


class Tapped(nn.Module):
    """A network whose layers' outputs are returned with its logits.

    The network is traced once in train and once in eval mode (`torch.fx`), and what was traced runs on the network's own
    modules and parameters: nothing is copied, hooked or changed, so that the state dict, `torch.compile(fullgraph=True)`
    and `torch.func.functional_call` see the plain network. A layer's output is returned as it left the layer, even where
    the network then changes it in place.

    Args:
        model: a network of images whose forward pass `torch.fx` can trace; torchvision's and timm's can.
        layers: names of modules, as in `model.named_modules()`; one feature each, in this order. Of a module that runs
            several times the last output is returned.
        example: images [batch, channels, height, width] to measure the features with; by default black ones of the
            size the model names, else of 224x224.

    Attributes:
        model: the bare network.
        layers: the names.
        widths: channels of each feature: maps are [batch, channels, height, width], also where the network computes
            them with the channels last (Swin); a transformer's tokens are [batch, tokens, channels].

    Raises:
        ValueError: for a layer that is not there, never runs or returns no feature, for a network that cannot be traced,
            and for an example it cannot take; one sentence.

    Source: the tracing of layers by name is that of torchvision.models.feature_extraction.

    Example:
        >>> student = Tapped(torchvision.models.resnet18(num_classes=100), ["layer1", "layer2", "layer3", "layer4"])
        >>> logits, features = student(images, features=True)
        >>> student.widths
        (64, 128, 256, 512)
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], example: Tensor | None = None):
        super().__init__()
        self.model, self.layers = model, tuple(layers)
        if isinstance(layers, str) or not self.layers:
            raise ValueError(f"layers must be a list of at least one name of a layer, got {layers!r}.")
        for layer in self.layers:
            _check_is_there(model, layer)
        images = _images_for(model, example)
        root = nn.Sequential(OrderedDict(model=model))
        modes = [(module, module.training) for module in model.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self._train_run, _ = self._traced(root.train(), images)
                self._eval_run, features = self._traced(root.eval(), images)
                self._check_logits(images)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, training in modes:
                module.training = training
        self.widths = tuple(feature.shape[-1 if feature.dim() == 3 else 1] for feature in features)

    def forward(
        self,
        images: Tensor,  # [batch, in_channels, height, width]
        features: bool = False,
    ) -> Any:
        """What the network returns; with ``features`` also the layers' outputs, a list."""
        if not features:
            return self.model(images)
        run = self._train_run if self.model.training else self._eval_run
        return run(self, images)

    def _traced(self, root: nn.Module, images: Tensor) -> tuple[Callable, list[Tensor]]:
        """The network of this mode as a function of (self, images), and the features it gives for these."""
        name = type(self.model).__name__
        tracer = _Tracer(self.model)
        try:
            graph = tracer.trace(root)
        except Exception as error:
            raise ValueError(
                f"A {name} cannot be traced by torch.fx ({str(error).splitlines()[0]}); let its forward(images, "
                "features=True) return (logits, features) itself."
            ) from error
        nodes = []
        for layer in self.layers:
            output = tracer.outputs.get(self.model.get_submodule(layer))
            if output is None:
                mode = "train" if root.training else "eval"
                raise ValueError(f"The layer {layer!r} of the {name} does not run in {mode} mode; choose another.")
            if not isinstance(output, fx.Proxy):
                raise ValueError(f"The layer {layer!r} of the {name} must return one tensor; choose one inside it.")
            nodes.append(output.node)
        watch = _Watch(root, graph, nodes)
        try:
            watch.run(images)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"A {name} does not run on images {list(images.shape)} ({str(error).splitlines()[0]}); give an example of "
                "those it takes."
            ) from error
        for node, layer in zip(nodes, self.layers, strict=True):
            value = watch.values[node]
            if not isinstance(value, Tensor) or not 2 <= value.dim() <= 4:
                came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"The layer {layer!r} of the {name} must return [batch, channels, height, width] or [batch, tokens, "
                    f"channels], got {came}; choose another."
                )
        last = [_channels_come_last(self.model, layer) for layer in self.layers]
        (end,) = (node for node in graph.nodes if node.op == "output")
        end.args = ((end.args[0], [_tapped(graph, *of, watch) for of in zip(nodes, last, strict=True)]),)
        for node in graph.nodes:  # constants that the network makes on its way
            if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
                self.register_buffer(node.target, getattr(root, node.target), persistent=False)
        run = _function(graph)
        return run, run(self, images)[1]

    def _check_logits(self, images: Tensor) -> None:
        traced, plain = self._eval_run(self, images)[0], self.model(images)
        if not isinstance(plain, Tensor):
            raise ValueError(
                f"A {type(self.model).__name__} must return the logits, one tensor, in eval mode, got "
                f"{type(plain).__name__}."
            )
        if not torch.allclose(traced, plain, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"What torch.fx traced of the {type(self.model).__name__} does not give its logits; let its "
                "forward(images, features=True) return (logits, features) itself."
            )


def bare(network: nn.Module) -> nn.Module:
    """The network without `Tapped` around it: what is exported."""
    return network.model if isinstance(network, Tapped) else network


class _Tracer(fx.Tracer):
    """Traces through all modules but torch's own and those that their library asks to leave whole.

    Attributes:
        outputs: what each module returned.
    """

    def __init__(self, model: nn.Module):
        wrapped_modules, wrapped_functions, self._whole = [math], (), ()
        kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
        if "torchvision" in kinds:
            from torchvision import ops

            wrapped_modules.append(ops)
        if "timm" in kinds:
            from timm.layers import get_notrace_functions, get_notrace_modules

            wrapped_functions, self._whole = tuple(get_notrace_functions()), tuple(get_notrace_modules())
        super().__init__(autowrap_modules=tuple(wrapped_modules), autowrap_functions=wrapped_functions)
        self.outputs: dict[nn.Module, Any] = {}

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        whole = type(module).__module__.startswith("torchvision.ops.") and not isinstance(module, nn.Sequential)
        return whole or isinstance(module, self._whole) or super().is_leaf_module(module, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.outputs[m] = output = super().call_module(m, forward, args, kwargs)
        return output


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the values of some nodes, and how often each had been changed in place by then."""

    def __init__(self, root: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node]):
        super().__init__(root, graph=graph)
        self._watched = set(nodes)
        self.values: dict[fx.Node, Any] = {}
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._watched:
            self.values[n] = value
            if isinstance(value, Tensor):
                self._versions[n] = value._version
        return value

    def changed_later(self, node: fx.Node) -> bool:
        return self.values[node]._version != self._versions[node]


def _tapped(graph: fx.Graph, node: fx.Node, channels_last: bool, watch: _Watch) -> fx.Node:
    """The node to return for it: the same, a copy where it is changed later, its channels brought to the front."""
    with graph.inserting_after(node):
        tap = graph.call_method("clone", (node,)) if watch.changed_later(node) else node
    if channels_last and watch.values[node].dim() == 4:
        with graph.inserting_after(tap):
            tap = graph.call_method("permute", (tap, 0, 3, 1, 2))
    return tap


def _function(graph: fx.Graph) -> Callable[[nn.Module, Tensor], tuple[Any, list[Tensor]]]:
    """The graph as a function whose first argument holds the modules and parameters."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<traced network>", "exec"), names)
    return names["forward"]


def _check_is_there(model: nn.Module, layer: str) -> None:
    known = [name for name, _ in model.named_modules() if name]
    if layer not in known:
        near = difflib.get_close_matches(layer, known, n=5, cutoff=0.5)
        near = near or [name for name, _ in model.named_children()]
        raise ValueError(f"A {type(model).__name__} has no layer {layer!r}; it has {', '.join(near)}, ...")


def _channels_come_last(model: nn.Module, layer: str) -> bool:
    """Whether the layer's map is [batch, height, width, channels]."""
    swin = type(model).__module__ == "torchvision.models.swin_transformer" and layer.split(".")[0] in (
        "features",
        "norm",
    )
    return swin or getattr(model, "output_fmt", "") == "NHWC"  # of timm


def _images_for(model: nn.Module, example: Tensor | None) -> Tensor:
    """The example, or black images; at least two, as BatchNorm of a 1x1 map needs."""
    like = next(model.parameters())
    if example is not None:
        return example.to(like) if len(example) > 1 else example.to(like).expand(2, *example.shape[1:])
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is None:
        raise ValueError(
            f"Tapped needs an example input: a {type(model).__name__} has no convolution to tell its channels."
        )
    settings = getattr(model, "pretrained_cfg", None) or {}
    side = getattr(model, "image_size", SIZE)  # torchvision's vision transformer
    height, width = settings.get("input_size", (0, side, side))[1:]
    return like.new_zeros(2, convolution.in_channels, height, width)
