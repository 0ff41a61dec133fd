"""Import torchvision (or timm, which imports it) through here: it also works beside a torch without CUDA.

PyPI's torchvision is built for a CUDA torch. Beside a CPU torch its compiled operators (nms, roi_align) cannot be
loaded, and `import torchvision` stops at the first one it wants to describe. Declaring those two lets models,
transforms and data sets be imported; calling the operators themselves still raises.
"""

import importlib
from types import ModuleType

import torch

_DESCRIBED_AT_IMPORT = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: torch.library.Library | None = None  # alive as long as the process, or the declarations go with it


def import_module(name: str) -> ModuleType:
    """The module `name`, of torchvision, timm or anything else that imports torchvision.

    Raises:
        ImportError: where it is not installed, naming the command that installs it.

    Example:
        >>> v2 = import_module("torchvision.transforms.v2")
    """
    global _declared
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs {error.name}, which is not installed; run: pip install {error.name}"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared is not None:
            raise
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator, schema in _DESCRIBED_AT_IMPORT.items():
        _declared.define(operator + schema)
    return importlib.import_module(name)
