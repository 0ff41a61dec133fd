"""Which implementation of each op runs on each device, and why another does not."""

import torch

from kdfast import _native, triton

if torch.version.cuda is not None:
    triton.register()

OPS = {
    "kd_kl": ("kd_kl", "kd_kl_backward", "kd_kl_value_and_grad", "kd_kl_scale_"),
    "kd_kl_exits": ("kd_kl_exits",),
    "kd_kl_hvp": ("kd_kl_hvp",),
    "kd_kl_topk": ("kd_kl_topk", "kd_kl_topk_backward"),
    "incorrect_brier": ("incorrect_brier", "incorrect_brier_backward", "incorrect_brier_value_and_grad"),
    "perturb": ("perturb",),
    "virtual_step": ("virtual_step",),
    "augment_images": ("augment_images",),
    "pathways": ("pathways", "pathways_backward", "pathways_value_and_grad"),
}


def show_backends() -> str:
    """A line for each op and device: what runs, and why another does not.

    Returns:
        The text; `kdfast backends` prints it.

    Example:
        >>> print(show_backends())  # doctest: +SKIP
        op                    cpu            cuda
        ...
    """
    import kdfast.data.resident  # noqa: F401 (defines its op, which nothing else of the package needs)

    rows = [("op", "cpu", "cuda")]
    rows += [(name, _cpu(name), _cuda(name)) for names in OPS.values() for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_reasons()])


def _cpu(name: str) -> str:
    if _native.has_kernel(name, "CPU"):
        return f"C++ ({_native.build_info['vector_unit']})"
    return "reference (PyTorch)"


def _cuda(name: str) -> str:
    if torch.version.cuda is None:
        return "none"
    if _native.has_kernel(name, "CUDA"):
        return "Triton" if name in triton.registered else "CUDA C++"
    return "by the ops it is made of" if name.endswith("_value_and_grad") else "reference (PyTorch)"


def _reasons() -> list[str]:
    native = _native.build_info
    no_cuda = f"torch {torch.__version__} is a build without CUDA"
    cpu = f"built with {native.get('compiler')}" if _native.failure is None else f"not built: {_native.failure}"
    if native.get("cuda_architectures"):
        cuda = f"built for sm_{native['cuda_architectures'].replace(';', ', sm_')}"
    elif torch.version.cuda is None:
        cuda = f"not built: {no_cuda}"
    else:
        cuda = (
            "not built: no nvcc, or KDFAST_CUDA=OFF, when kdfast was installed; install the CUDA toolkit and "
            "reinstall kdfast"
        )
    python = f"not used: {no_cuda}" if torch.version.cuda is None else triton.status()
    lines = [f"C++: {cpu}", f"CUDA C++: {cuda}", f"Triton: {python}"]
    if _native.failure is None and _native.autograd is None:
        built_for = native.get("torch")
        lines.insert(1, f"C++ graph nodes: not used: built for torch {built_for}, this is torch {torch.__version__}")
    return lines
