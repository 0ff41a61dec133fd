"""Any torchvision or timm network as one that returns the outputs of its layers, by their names."""

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdfast.models.tapped_parts import Cut, Tap, TappedPart, check_apart, cuts, function_of

SIZE = 224  # of the image a network is measured with where it names no other


class Tapped(nn.Module):
    """A network whose layers' outputs are returned with its logits.

    The network is traced once in train and once in eval mode (`torch.fx`), and what was traced runs on the network's
    own modules and parameters: nothing is copied, hooked or changed, so that the state dict, `torch.compile` with
    ``fullgraph=True`` and `torch.func.functional_call` see the plain network. A layer's output is returned as it left
    the layer, even where the network then changes it in place.

    Args:
        model: a network of images whose forward pass `torch.fx` can trace; torchvision's and timm's can.
        layers: names of modules, as in `model.named_modules()`; one feature each, in this order. Of a module that runs
            several times the last output is returned.
        example: images [batch, channels, height, width] to measure the features with; by default black ones of the
            size the model names, else of 224x224.

    Attributes:
        model: the bare network.
        layers: the names.
        image_shape: (channels, height, width) of the images it was measured with.
        widths: channels of each feature: maps are [batch, channels, height, width], also where the network computes
            them with the channels last (Swin); a transformer's tokens are [batch, tokens, channels].

    Raises:
        ValueError: for a layer that is not there, never runs or returns no feature, for a network that cannot be
            traced, and for an example it cannot take; one sentence.

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
                self._train_run, self._train_cuts, _ = self._traced(root.train(), images)
                self._eval_run, self._eval_cuts, features = self._traced(root.eval(), images)
                self._check_logits(images)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, training in modes:
                module.training = training
        self.widths = tuple(feature.shape[-1 if feature.dim() == 3 else 1] for feature in features)
        self.image_shape = tuple(images.shape[1:])
        self._handed_out: tuple[TappedPart, ...] = ()  # in a tuple: what they hold is registered as the model's

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

    def parts(self) -> tuple[list[nn.Module], nn.Module]:
        """The network cut at the layers: a part up to each of them, and the head, which is all that follows the last.

        Run one after another they are the network; each takes the feature before it, as `forward` returns it. They hold
        the network's own modules and parameters, and follow its mode, device and dtype.

        Raises:
            ValueError: where the layers are not in the order in which they run, where what follows a layer reads more
                than its output, and where two parts share parameters; one sentence.
        """
        if not self._handed_out:
            for found in (self._train_cuts, self._eval_cuts):
                if isinstance(found, str):
                    raise ValueError(found)
            pairs = zip(self._train_cuts, self._eval_cuts, strict=True)
            parts = [TappedPart(self, *pair, training=self.model.training) for pair in pairs]
            check_apart(parts, [*(f"the part that ends in {layer!r}" for layer in self.layers), "the head"])
            self._handed_out = tuple(parts)
        *stages, head = self._handed_out
        return stages, head

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self._handed_out:
            part.train(mode)
        return self

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for part in self._handed_out:
            part.follow(self)
        return self

    def _traced(self, root: nn.Module, images: Tensor) -> tuple[Callable, list[Cut] | str, list[Tensor]]:
        """The network of this mode as a function of (self, images), its cuts, and the features for these images.

        Where it cannot be cut, why.
        """
        name = type(self.model).__name__
        tracer = LayerTracer(self.model)
        try:
            graph = tracer.trace(root)
        except Exception as error:
            raise ValueError(
                f"A {name} cannot be traced by torch.fx ({_first_line(error)}); let its forward(images, features=True) "
                "return (logits, features) itself."
            ) from error
        taps = []
        for layer in self.layers:
            output, returned = tracer.outputs.get(self.model.get_submodule(layer), (None, None))
            if returned is None:
                mode = "train" if root.training else "eval"
                raise ValueError(f"The layer {layer!r} of the {name} does not run in {mode} mode; choose another.")
            if not isinstance(output, fx.Proxy):
                raise ValueError(f"The layer {layer!r} of the {name} must return one tensor; choose one inside it.")
            taps.append(Tap(output.node, returned, _channels_come_last(self.model, layer)))
        watch = _Watch(root, graph, taps)
        try:
            watch.run(images)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"A {name} does not run on images {list(images.shape)} ({_first_line(error)}); give an example of "
                "those it takes."
            ) from error
        for tap, layer in zip(taps, self.layers, strict=True):
            value = watch.values[tap.node]
            if not isinstance(value, Tensor) or not 2 <= value.dim() <= 4:
                came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"The layer {layer!r} of the {name} must return [batch, channels, height, width] or [batch, "
                    f"tokens, channels], got {came}; choose another."
                )
        taps = [watch.told(tap) for tap in taps]
        try:
            found = cuts(graph, self.layers, taps)
        except ValueError as error:  # whoever wants no parts needs none
            found = f"A {name} tapped at {', '.join(self.layers)}: {error}"
        (end,) = (node for node in graph.nodes if node.op == "output")
        end.args = ((end.args[0], [_tapped(graph, tap) for tap in taps]),)
        for node in graph.nodes:  # constants that the network makes on its way
            if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
                self.register_buffer(node.target, getattr(root, node.target), persistent=False)
        run = function_of(graph)
        return run, found, run(self, images)[1]

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


class LayerTracer(fx.Tracer):
    """Traces through all modules but torch's own and those that their library asks to leave whole.

    Attributes:
        outputs: what each module returned, and the last node by then.
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
        self.outputs: dict[nn.Module, tuple[Any, fx.Node]] = {}

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        whole = type(module).__module__.startswith("torchvision.ops.") and not isinstance(module, nn.Sequential)
        return whole or isinstance(module, self._whole) or super().is_leaf_module(module, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        self.outputs[m] = output, next(iter(reversed(self.graph.nodes)))
        return output


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the tapped values, and how often each was changed in place until it was returned."""

    def __init__(self, root: nn.Module, graph: fx.Graph, taps: Sequence[Tap]):
        super().__init__(root, graph=graph)
        self._taps = taps
        self.values: dict[fx.Node, Any] = {}
        self._versions: dict[Tap, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for tap in self._taps:
            if n is tap.node:
                self.values[n] = value
            if n is tap.returned and isinstance(self.values[tap.node], Tensor):
                self._versions[tap] = self.values[tap.node]._version
        return value

    def told(self, tap: Tap) -> Tap:
        """With what only running it could tell."""
        value = self.values[tap.node]
        changed = value._version != self._versions[tap]
        return tap._replace(channels_last=tap.channels_last and value.dim() == 4, changed=changed)


def _tapped(graph: fx.Graph, tap: Tap) -> fx.Node:
    """The node to return for it: the same, a copy where it is changed later, its channels brought to the front."""
    node = tap.node
    if tap.changed:
        with graph.inserting_after(tap.returned):
            node = graph.call_method("clone", (node,))
    if tap.channels_last:
        with graph.inserting_after(tap.returned if node is tap.node else node):
            node = graph.call_method("permute", (node, 0, 3, 1, 2))
    return node


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_is_there(model: nn.Module, layer: str) -> None:
    known = [name for name, _ in model.named_modules() if name]
    if layer not in known:
        alike = [name for name in known if name.count(".") == layer.count(".")]  # as deep inside
        near = difflib.get_close_matches(layer, alike, n=5, cutoff=0.5) or difflib.get_close_matches(layer, known, n=5)
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
