// kdfast._C: importing it registers the compiled kernels (their static initialisers run as the library is
// loaded); what it exports says how it was built. Built on its own, as torch's stable headers and Python's
// do not meet in one file.
#include <pybind11/pybind11.h>

#include <string>

#ifndef KDFAST_WITH_CUDA
#define KDFAST_WITH_CUDA ""
#endif

namespace {

std::string vector_unit() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
  return "SSE2";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "scalar";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = KDFAST_COMPILER;
  info["vector_unit"] = vector_unit();
  info["cuda_architectures"] = KDFAST_WITH_CUDA;
  info["sanitizers"] = KDFAST_SANITIZED;
  info["torch"] = KDFAST_TORCH;  // the only one beside which _C_autograd may be loaded
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's compiled kernels.";
  m.def("build_info", &build_info, "Compiler, vector unit in use, CUDA architectures, sanitizers and torch of this build.");
}
