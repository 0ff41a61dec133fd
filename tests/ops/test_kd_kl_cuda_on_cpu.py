"""The CUDA kernels of kd_kl and their launchers, run on a CPU: their own source, a block's threads as fibers.

What a GPU adds (its arithmetic, its memory, speed) is left to test_kd_kl_cuda.py.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdfast.reference.kd_kl import STATS, Options, accumulate_dtype
from tests.ops.kd_kl_cases import CASES, EDGES, Case, check, make, run
from tests.ops.kd_kl_cuda_cases import JSD, OTHER_EDGES, OTHERS, SPLIT, check_others, check_value_and_grad

ROOT = Path(__file__).resolve().parents[2]
PART = 17  # kPart
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
COLUMNS = ("student_temperature", "teacher_temperature", "labels", "weight", "grad")
OUTPUTS = ("loss", "stats", "parts", "student_grad", "teacher_grad")
LIMITS = {"sm_90": (232448, 16), "sm_80": (166912, 1), "sm_120": (101376, 8)}  # bytes a block, blocks a cluster


class _Column(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class _Request(ctypes.Structure):
    """Request of kd_kl_launch.h, field by field."""

    _fields_ = [
        ("student", ctypes.c_void_p), ("teacher", ctypes.c_void_p),
        *((name, _Column) for name in COLUMNS),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in OUTPUTS),
        *((name, ctypes.c_double) for name in ("tau_s", "tau_t", "alpha", "label_smoothing")),
        ("ignore_index", ctypes.c_int64), ("divergence", ctypes.c_int), ("scale", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("beta", "target_weight", "softcap", "logit_scale", "coefficient")),
        ("temperature_grad", ctypes.c_bool),
        ("storage", ctypes.c_int), ("rows", ctypes.c_int64), ("classes", ctypes.c_int), ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Kernels:
    """The three ops, with the arguments of the schema, on CPU tensors."""

    def __init__(self, library):
        self.library = library
        self.gpu("sm_90")

    def gpu(self, name: str) -> None:
        self.library.gpu(*LIMITS[name])

    def _request(self, tensors, options: Options, **more) -> tuple:
        student, teacher, tau_s, tau_t, labels, target, weight = tensors
        request = _Request(**options._asdict(), **{k: v for k, v in more.items() if not torch.is_tensor(v)})
        pointers = {"student": student, "teacher": teacher, "target": target}
        columns = {"student_temperature": tau_s, "teacher_temperature": tau_t, "labels": labels, "weight": weight}
        for name, x in {**pointers, **columns, **{k: v for k, v in more.items() if torch.is_tensor(v)}}.items():
            if x is not None:
                stride = 0 if x.numel() == 1 else x.stride(0)
                setattr(request, name, _Column(x.data_ptr(), stride) if name in COLUMNS else x.data_ptr())
        request.rows, request.classes = student.shape
        request.storage = STORAGE[student.dtype]
        soft = options.alpha < 1
        family = {3: 1, 4: 2}.get(options.divergence, 0) if soft else 0
        mapped = options.softcap > 0 or options.logit_scale != 1
        return family, mapped, request

    def _with_parts(self, tensors, options: Options, **more) -> tuple:
        """A request, and the workspace it points to."""
        family, mapped, request = self._request(tensors, options, **more)
        parts = self.library.forward_parts(family, mapped, ctypes.byref(request))
        accumulate = accumulate_dtype(tensors[0].dtype)
        workspace = torch.full((request.rows * parts * PART,), float("nan"), dtype=accumulate)
        request.parts = workspace.data_ptr()
        return family, mapped, request, workspace

    def forward(self, *args) -> tuple:
        *inputs, temperature_grad = args
        tensors, options = inputs[:7], Options(*inputs[7:])
        loss, stats = self._empty(tensors[0])
        family, mapped, request, _workspace = self._with_parts(
            tensors, options, loss=loss, stats=stats, temperature_grad=temperature_grad
        )
        if request.rows:
            assert self.library.forward(family, mapped, ctypes.byref(request)) == 0
        return loss, stats

    def backward(self, grad, *args) -> tuple:
        tensors, stats, options = args[:7], args[7], Options(*args[8:-2])
        outputs = [torch.empty_like(x) if wanted else None for x, wanted in zip(tensors[:2], args[-2:], strict=True)]
        given = {n: x for n, x in zip(OUTPUTS[-2:], outputs, strict=True) if x is not None}
        family, mapped, request = self._request(tensors, options, grad=grad, stats=stats, **given)
        if request.rows:
            assert self.library.backward(family, mapped, ctypes.byref(request)) == 0
        return tuple(tensors[0].new_empty(0) if x is None else x for x in outputs)

    def value_and_grad(self, *args) -> tuple | None:
        """None where the launcher says that a row does not fit on chip."""
        *inputs, temperature_grad, coefficient = args
        tensors, options = inputs[:7], Options(*inputs[7:])
        loss, stats = self._empty(tensors[0])
        ds = torch.empty_like(tensors[0])
        family, mapped, request = self._request(
            tensors, options, loss=loss, stats=stats, student_grad=ds,
            coefficient=coefficient, temperature_grad=temperature_grad,
        )  # fmt: skip
        code = self.library.value_and_grad(family, mapped, ctypes.byref(request))
        assert code in (0, 801)
        return None if code else (loss.sum() * coefficient, stats, ds)

    @staticmethod
    def _empty(student) -> tuple:
        loss = student.new_full((student.shape[0],), float("nan"), dtype=accumulate_dtype(student.dtype))
        return loss, loss.new_full((student.shape[0], STATS), float("nan"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kd_kl.so"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas",
        *(["-fno-extern-tls-init"] if "clang" not in version else []),  # extern __shared__ has no constructor
        "-I", str(ROOT / "tests" / "ops" / "cuda_fibers"), "-I", str(ROOT),
        str(ROOT / "tests" / "ops" / "kd_kl_cuda_on_cpu.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Kernels(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, kernels):
    check(case, kernels.forward, kernels.backward)


@pytest.mark.parametrize("edge", EDGES + OTHER_EDGES, ids=lambda f: f.__name__)
def test_edge(edge, kernels):
    edge(kernels.forward, kernels.backward)


@pytest.mark.parametrize("case", [SPLIT[0], SPLIT[4], CASES[18]], ids=str)
def test_any_order_of_threads(case, kernels):
    """A missing barrier would show as a difference."""
    tensors = make(case)
    grad = torch.ones(case.rows, dtype=accumulate_dtype(case.dtype))
    results = []
    for backwards in (False, True):
        kernels.library.order(backwards)
        results.append(run(kernels.forward, kernels.backward, tensors, case.options, grad)[0])
        if case.dtype != torch.float64:
            results[-1] += kernels.value_and_grad(*tensors, *case.options, True, 1.0)
    kernels.library.order(False)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_divergences_and_maps(case, kernels):
    check_others(case, kernels.forward, kernels.backward)


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_several_blocks_a_row(case, kernels):
    kernels.library.launches()
    check_others(case, kernels.forward, kernels.backward)
    second = case.temperatures or case.options.divergence == JSD["divergence"]
    both = 2 if case.options.alpha == 1 or not second else 3
    assert kernels.library.launches() == both + 1  # that many forward, one backward


def test_several_blocks_a_row_the_same_bit_for_bit(kernels):
    tensors = make(SPLIT[0])
    first, again = (run(kernels.forward, kernels.backward, tensors, SPLIT[0].options, torch.ones(3))[0] for _ in "12")
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


FUSED = [
    *(case for case in CASES + OTHERS if case.dtype != torch.float64),
    Case("block", 2, 5003, Options(2.0, 3.0, 0.3, 0.1), hard="ignored", temperatures="rows", masked=True),
    Case("48 KB", 2, 6144, Options(2.0, 3.0, 0.3), hard="labels"),  # all that a block has unasked, had it nothing else
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_value_and_grad(case, kernels):
    check_value_and_grad(case, kernels.value_and_grad, kernels.forward)


WIDE = [
    Case("kl", 2, 30011, Options(2.0, 3.0, 0.3), hard="labels", temperatures="rows", masked=True),
    Case("jsd", 2, 30011, Options(2.0, 3.0, beta=0.7, **JSD), temperatures="one"),
    Case("dkd", 2, 60011, Options(2.0, 3.0, divergence=4, beta=2.0), torch.bfloat16, "ignored"),
]


@pytest.mark.parametrize(("gpu", "clusters"), [("sm_90", 4), ("sm_120", 8), ("sm_80", None)])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_value_and_grad_of_a_wide_row(case, gpu, clusters, kernels):
    """In a cluster's shared memory where there are clusters, and turned down where there are none."""
    kernels.gpu(gpu)
    try:
        if clusters is None:
            assert kernels.value_and_grad(*make(case), *case.options, bool(case.temperatures), 1.0) is None
        else:
            kernels.value_and_grad(*make(case), *case.options, bool(case.temperatures), 1.0)
            assert kernels.library.cluster_seen() == clusters
            check_value_and_grad(case, kernels.value_and_grad, kernels.forward)
    finally:
        kernels.gpu("sm_90")


def test_the_size_of_a_cluster(kernels):
    """As few blocks as leave room for two on a multiprocessor; more than the largest cluster holds is turned down."""
    for classes, dtype, blocks in ((6000, torch.float32, 1), (20000, torch.float32, 2), (60000, torch.bfloat16, 4)):
        case = Case("size", 1, classes, Options(), dtype)
        assert kernels.value_and_grad(*make(case), *case.options, False, 1.0) is not None
        assert kernels.library.cluster_seen() == blocks
    too_wide = Case("size", 1, 600_000, Options())
    assert kernels.value_and_grad(*make(too_wide), *too_wide.options, False, 1.0) is None
