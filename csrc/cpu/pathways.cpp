// pathways on the CPU: the distances of a list of feature pairs and their gradients, a few channels at a time in cache.
//
//   loss = sum_p w_p delta(a_p, b_p),   delta of r = a resized to b's height and width, d = r - b
//   mse        mean of d^2                                            dr = 2 d / n
//   l1         mean of |d|                                            dr = sign(d) / n
//   hcl        (mean of d^2 + sum_k 2^-k mean of pool_k(d)^2) / sum   dr = (2 d / n + the windows' terms) / sum
//   attention  mean of (A(r)/|A(r)| - A(b)/|A(b)|)^2, A = sum_c x^2   dr = 2 r dA
//
// Fused: resizing, difference, pooling at three levels, squares and the gradient, for all pathways in one call. Nothing of
// a feature's size is ever stored but the gradient: a tile of channels is read, swept twice in cache, and its gradient
// written; maps are resized and widened tile by tile. Pathways of one teacher's map follow each other within a sample.
// Memory: 3 passes over each pair (read a, b; write da), b from cache where many pathways share it: 12 bytes an element
// in fp32, 6 in bf16. attention reads a once more where a sample's channels are larger than the cache.
// Source: Chen et al. 2021 (hcl), Zagoruyko and Komodakis 2017 (attention); docs/math/pathways.md.
#include <numeric>

#include "../stable.h"
#include "gradients.h"
#include "pathways_distances.h"

namespace kdfast::cpu {
namespace {

enum Distance { kMse = 0, kL1 = 1, kHcl = 2, kAttention = 3 };
using Tensors = std::vector<Tensor>;

// What is compiled once for each kind of vector unit.
#define KDFAST_STORAGE(S)                                                                                            \
  KDFAST_CLONES double flat_tile(const S* a, const S* b, S* da, S* db, int64_t n, bool l1, Wide<S> factor) {         \
    return l1 ? flat<true>(a, b, da, db, n, factor) : flat<false>(a, b, da, db, n, factor);                          \
  }                                                                                                                  \
  KDFAST_CLONES double hcl_tile(const Pair<S>& x, const Hcl& h, const double* part, double factor, Wide<S>* scratch) { \
    switch (std::is_same_v<S, float> && h.columns.count == 4 ? h.columns.begin[4] : 0) {                             \
      case 8: return hcl<8>(x, h, part, factor, scratch);                                                            \
      case 16: return hcl<16>(x, h, part, factor, scratch);                                                          \
      case 32: return hcl<32>(x, h, part, factor, scratch);                                                          \
      default: return hcl<0>(x, h, part, factor, scratch);                                                           \
    }                                                                                                                \
  }                                                                                                                  \
  KDFAST_CLONES void energy_tile(const Tile<const S>& x, double* energy, Wide<S>* partial) {                         \
    add_energy(x, energy, partial);                                                                                  \
  }                                                                                                                  \
  KDFAST_CLONES void scale_tile(const Tile<const S>& x, const Wide<S>* factor, S* out) { scale(x, factor, out); }
KDFAST_STORAGE(float)
KDFAST_STORAGE(double)
KDFAST_STORAGE(BFloat16Bits)
KDFAST_STORAGE(HalfBits)
#undef KDFAST_STORAGE
#define KDFAST_CONVERT(From, To) \
  KDFAST_CLONES void copy_tile(const Tile<const From>& from, const Tile<To>& to) { convert(from, to); }
KDFAST_CONVERT(float, float)
KDFAST_CONVERT(double, double)
KDFAST_CONVERT(BFloat16Bits, float)
KDFAST_CONVERT(HalfBits, float)
KDFAST_CONVERT(float, BFloat16Bits)
KDFAST_CONVERT(float, HalfBits)
#undef KDFAST_CONVERT
#define KDFAST_ARITHMETIC(A)                                                                                      \
  KDFAST_CLONES void resize(const Resize<A>& r, const A* from, A* to, int64_t channels, bool interleaved, A* line) { \
    interleaved ? resize_interleaved(r, from, to, channels) : resize_planes(r, from, to, channels, line);         \
  }                                                                                                               \
  KDFAST_CLONES void resize_adjoint(const Resize<A>& r, const A* grad, A* to, int64_t channels, bool interleaved, A* line) { \
    interleaved ? resize_interleaved_adjoint(r, grad, to, channels) : resize_planes_adjoint(r, grad, to, channels, line); \
  }                                                                                                               \
  KDFAST_CLONES void unit_gradient(const double* u, const double* v, double inverse, double factor, A* out, int64_t n) { \
    energy_gradient(u, v, inverse, factor, out, n);                                                               \
  }
KDFAST_ARITHMETIC(float)
KDFAST_ARITHMETIC(double)
#undef KDFAST_ARITHMETIC
KDFAST_CLONES double unit(double* energy, int64_t n) { return normalise(energy, n); }

// One pathway: its maps, the gradients' memory (data null where none is asked for), and all that its tiles share.
template <class A>
struct Pathway {
  Map student, teacher, student_grad, teacher_grad;
  int64_t batch;
  double coefficient;                   // of its distance in the gradients
  std::optional<Resize<A>> resize;      // where the sizes differ
  Hcl hcl;
  std::vector<double> part;             // hcl: weight of one d^2, then of one window's m^2 at each level
};

// Numbers kept between calls, so that no call faults pages in.
template <class A>
struct Scratch {
  std::vector<A> memory;
  std::vector<double> energy;
  A* take(int64_t n) {
    if (static_cast<int64_t>(memory.size()) < n) memory.resize(n);
    return memory.data();
  }
};

// Channels to a tile: two tiles of this size stay in the first or second cache between the sweeps. Interleaved, a tile is
// not narrower than four cache lines.
int64_t tile_channels(const Map& student, const Map& teacher, bool interleaved) {
  const int64_t positions = std::max(student.positions(), teacher.positions());
  const int64_t channels = interleaved ? std::max<int64_t>(64, 16384 / positions / 16 * 16) : std::max<int64_t>(1, 4096 / positions);
  return std::min(student.channels, channels);
}

// The channels [c, c + n) of a map as numbers of the arithmetic, packed; a student's resized to its teacher's size.
template <class T, class A>
void load(const Map& map, const Resize<A>* r, int64_t sample, int64_t c, int64_t n, bool interleaved, A* to, A* spare, A* line) {
  copy_tile(Tile<const T>(map, sample, c, n), Tile<A>(r == nullptr ? to : spare, n, map.positions(), interleaved));
  if (r != nullptr) resize(*r, spare, to, n, interleaved, line);
}

// The reverse, for gradients.
template <class T, class A>
void store(const Map& map, const Resize<A>* r, int64_t sample, int64_t c, int64_t n, bool interleaved, A* grad, A* spare, A* line) {
  if (r != nullptr) resize_adjoint(*r, grad, spare, n, interleaved, line);
  copy_tile(Tile<const A>(r == nullptr ? grad : spare, n, map.positions(), interleaved), Tile<T>(map, sample, c, n));
}

template <class S, class A>
double difference_tile(const Pathway<A>& p, const Pair<S>& x, int64_t distance, A* scratch) {
  if (distance == kHcl && p.hcl.levels > 0) return hcl_tile(x, p.hcl, p.part.data(), p.coefficient, scratch);
  const double factor = p.coefficient * p.part[0];
  return p.part[0] * flat_tile(x.a.data, x.b.data, x.da, x.db, x.a.channels * x.a.positions, distance == kL1, static_cast<A>(factor));
}

// mse, l1 and hcl of one sample.
template <class T, class A>
double difference(const Pathway<A>& p, int64_t sample, int64_t distance, Scratch<A>& scratch) {
  const bool flat = distance != kHcl || p.hcl.levels == 0;
  const Resize<A>* const r = p.resize.has_value() ? &*p.resize : nullptr;
  // Rows too short for vectors: the tile is turned, so that vectors go over channels.
  const bool turned = !flat && !p.student.interleaved && p.teacher.width < 16 && p.teacher.width != 8 && p.student.channels >= 16;
  const bool interleaved = turned || p.student.interleaved;
  const bool widened = !flat && !interleaved && !std::is_same_v<T, A>;  // planes of halves: in whole vectors first
  const bool direct = r == nullptr && !widened && p.student.interleaved == interleaved && p.teacher.interleaved == interleaved;
  const int64_t channels = p.student.channels, positions = p.teacher.positions(), source = p.student.positions();
  const int64_t step = direct && flat ? channels : tile_channels(p.student, p.teacher, interleaved);
  const int64_t work = hcl_scratch(p.hcl, step), tile = direct ? 0 : step * positions, line_size = 2 * (p.student.width + p.teacher.width);
  A* const memory = scratch.take(work + 4 * tile + (r != nullptr ? step * source : 0) + line_size);
  A *const a = memory + work, *const b = a + tile, *const da = b + tile, *const db = da + tile, *const spare = db + tile;
  A* const line = spare + (r != nullptr ? step * source : 0);
  double total = 0;
  for (int64_t c = 0; c < channels; c += step) {
    const int64_t n = std::min(step, channels - c);
    const auto at = [&](const Map& map) { return map.data == nullptr ? nullptr : map.at<T>(sample, c); };
    if (direct) {
      total += difference_tile(p, Pair<T>{{p.student, sample, c, n}, {p.teacher, sample, c, n}, at(p.student_grad), at(p.teacher_grad)},
                               distance, memory);
      continue;
    }
    load<T>(p.student, r, sample, c, n, interleaved, a, spare, line);
    load<T, A>(p.teacher, nullptr, sample, c, n, interleaved, b, spare, line);
    const Pair<A> pair{{a, n, positions, interleaved}, {b, n, positions, interleaved},
                       p.student_grad.data == nullptr ? nullptr : da, p.teacher_grad.data == nullptr ? nullptr : db};
    total += difference_tile(p, pair, distance, memory);
    if (pair.da != nullptr) store<T>(p.student_grad, r, sample, c, n, interleaved, da, spare, line);
    if (pair.db != nullptr) store<T, A>(p.teacher_grad, nullptr, sample, c, n, interleaved, db, spare, line);
  }
  return total;
}

// attention of one sample: the maps of both, then, tile by tile once more, the gradients.
template <class T, class A>
double attention(const Pathway<A>& p, int64_t sample, Scratch<A>& scratch) {
  const int64_t positions = p.teacher.positions();
  const auto step_of = [&](const Map& map) {
    return std::min<int64_t>(map.channels, std::max<int64_t>(64, 16384 / std::max(map.positions(), positions) / 16 * 16));
  };
  const int64_t tile = p.resize.has_value() ? step_of(p.student) * (positions + p.student.positions()) : 0;
  A* const factor = scratch.take(positions + tile + 2 * (p.student.width + p.teacher.width));
  A *const resized = factor + positions, *const spare = resized + (tile > 0 ? step_of(p.student) * positions : 0);
  A* const line = factor + positions + tile;
  scratch.energy.assign(2 * positions, 0.0);
  double *const u = scratch.energy.data(), *const v = u + positions;

  const auto over_tiles = [&](const Map& map, const Resize<A>* r, const auto& body, const auto& body_resized) {
    const int64_t step = step_of(map);
    for (int64_t c = 0; c < map.channels; c += step) {
      const int64_t n = std::min(step, map.channels - c);
      if (r == nullptr) {
        body(c, Tile<const T>(map, sample, c, n));
      } else {
        load<T>(map, r, sample, c, n, map.interleaved, resized, spare, line);
        body_resized(c, Tile<const A>(resized, n, positions, map.interleaved));
      }
    }
  };
  const auto energy = [&](const Map& map, const Resize<A>* r, double* to) {
    const auto add = [&](int64_t, const auto& tile) { energy_tile(tile, to, factor); };
    over_tiles(map, r, add, add);
    return unit(to, positions);
  };
  const auto gradient = [&](const Map& map, const Map& grad, const Resize<A>* r, const double* own, const double* other, double inverse) {
    if (grad.data == nullptr) return;
    unit_gradient(own, other, inverse, p.coefficient * p.part[0], factor, positions);
    over_tiles(
        map, r, [&](int64_t c, const Tile<const T>& x) { scale_tile(x, factor, grad.at<T>(sample, c)); },
        [&](int64_t c, const Tile<const A>& x) {
          scale_tile(x, factor, resized);
          store<T>(grad, r, sample, c, x.channels, map.interleaved, resized, spare, line);
        });
  };

  const Resize<A>* const r = p.resize.has_value() ? &*p.resize : nullptr;
  const double inverse_u = energy(p.student, r, u), inverse_v = energy(p.teacher, nullptr, v);
  double total = 0;
  for (int64_t i = 0; i < positions; ++i) total += (u[i] - v[i]) * (u[i] - v[i]);
  gradient(p.student, p.student_grad, r, u, v, inverse_u);
  gradient(p.teacher, p.teacher_grad, nullptr, v, u, inverse_v);
  return p.part[0] * total;
}

Map as_map(const Tensor& x) {
  const bool planes = x.is_contiguous();
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const bool last = (channels == 1 || x.stride(1) == 1) && (width == 1 || x.stride(3) == channels) &&
                    (height == 1 || x.stride(2) == channels * width) && (x.size(0) == 1 || x.stride(0) == channels * height * width);
  STD_TORCH_CHECK(planes || last || x.numel() == 0, "pathways: maps must be contiguous or channels_last");
  return {x.data_ptr(), channels, height, width, !planes};
}

struct Call {
  const Tensors &students, &teachers;
  const OptionalTensor& keep;
  int64_t distance, resize;
  const Tensor* coefficients = nullptr;  // [pathways]; of the distances in the gradients
  bool student_grad = false, teacher_grad = false;
};

struct Result {
  Tensor distances;
  Tensors student_grads, teacher_grads;
};

template <class T, class A>
void run(const Call& call, Result& result) {
  const int64_t count = call.students.size();
  const bool* keep = data_or_null<bool>(call.keep);
  std::vector<Pathway<A>> pathways;  // those kept
  std::vector<int64_t> number;       // of each
  int64_t batch = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor &a = call.students[i], &b = call.teachers[i];
    if (call.student_grad) result.student_grads.push_back(empty_gradient(a));
    if (call.teacher_grad) result.teacher_grads.push_back(empty_gradient(b));
    const Map student = as_map(a), teacher = as_map(b);
    const auto grad_of = [&](bool asked, const Tensors& grads) { return asked ? as_map(grads.back()) : Map{}; };
    Pathway<A> p{student, teacher, grad_of(call.student_grad, result.student_grads), grad_of(call.teacher_grad, result.teacher_grads),
                 a.size(0), 1.0, std::nullopt, Hcl(teacher.height, teacher.width), {}};
    if (keep != nullptr && !keep[i]) {
      for (const Tensors* grads : {&result.student_grads, &result.teacher_grads}) {
        if (!grads->empty()) std::memset(grads->back().data_ptr(), 0, grads->back().numel() * grads->back().element_size());
      }
      continue;
    }
    if (call.coefficients != nullptr) p.coefficient = static_cast<const A*>(call.coefficients->data_ptr())[i];
    if (student.height != teacher.height || student.width != teacher.width) {
      const bool bilinear = call.resize == 1;
      p.resize = Resize<A>{student.height, student.width, Taps<A>(student.height, teacher.height, bilinear),
                           Taps<A>(student.width, teacher.width, bilinear), bilinear};
    }
    const double groups = static_cast<double>(p.batch) * (call.distance == kAttention ? 1 : teacher.channels);
    const double total = call.distance == kHcl ? p.hcl.total : 1.0;
    p.part.push_back(1 / (groups * teacher.positions() * total));
    for (int k = 0; k < p.hcl.levels; ++k) p.part.push_back(p.hcl.share[k] / (groups * p.hcl.level[k] * p.hcl.level[k] * total));
    batch = std::max(batch, p.batch);
    elements += a.numel() + b.numel();
    pathways.push_back(std::move(p));
    number.push_back(i);
  }

  // A sample's pathways of one teacher's map one after another, so that the map is read from memory once.
  const int64_t kept = pathways.size();
  std::vector<int64_t> order(kept);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return pathways[i].teacher.data < pathways[j].teacher.data; });
  std::vector<double> partial(kept * batch, 0.0);  // [batch, kept], summed in this order whatever the number of threads
  const auto some = [&](int64_t begin, int64_t end) {
    static thread_local Scratch<A> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Pathway<A>& p = pathways[order[i % kept]];
      const int64_t sample = i / kept;
      if (sample >= p.batch) continue;
      partial[sample * kept + order[i % kept]] =
          call.distance == kAttention ? attention<T>(p, sample, scratch) : difference<T>(p, sample, call.distance, scratch);
    }
  };
  // At least 32k elements to a thread: below that waking it costs more than it saves.
  const int64_t units = kept * batch, grain = elements == 0 ? 1 : std::max<int64_t>(1, units * 32768 / elements);
  units <= grain ? some(0, units) : torch::stable::parallel_for(0, units, grain, some);

  A* const distances = static_cast<A*>(result.distances.data_ptr());
  std::fill_n(distances, count, A(0));
  for (int64_t i = 0; i < kept; ++i) {
    double sum = 0;
    for (int64_t sample = 0; sample < batch; ++sample) sum += partial[sample * kept + i];
    distances[number[i]] = static_cast<A>(sum);
  }
}

Result run(const Call& call) {
  STD_TORCH_CHECK(!call.students.empty() && call.students.size() == call.teachers.size(), "pathways: lists of one length, at least 1");
  const Tensor& first = call.students[0];
  Result result{empty(first, {static_cast<int64_t>(call.students.size())}, accumulate_type(first.scalar_type())), {}, {}};
  switch (first.scalar_type()) {
    case ScalarType::Float: run<float, float>(call, result); break;
    case ScalarType::Double: run<double, double>(call, result); break;
    case ScalarType::BFloat16: run<BFloat16Bits, float>(call, result); break;
    case ScalarType::Half: run<HalfBits, float>(call, result); break;
    default: STD_TORCH_CHECK(false, "pathways: maps must be fp64, fp32, bf16 or fp16");
  }
  return result;
}

Tensor pathways(Tensors students, Tensors teachers, OptionalTensor keep, int64_t distance, int64_t resize) {
  return run(Call{students, teachers, keep, distance, resize}).distances;
}

std::tuple<Tensors, Tensors> pathways_backward(Tensor grad, Tensors students, Tensors teachers, OptionalTensor keep, int64_t distance,
                                               int64_t resize, bool student_grad, bool teacher_grad) {
  STD_TORCH_CHECK(grad.is_contiguous(), "pathways: grad must be contiguous");
  Result result = run(Call{students, teachers, keep, distance, resize, &grad, student_grad, teacher_grad});
  return {std::move(result.student_grads), std::move(result.teacher_grads)};
}

std::tuple<Tensor, Tensors> pathways_value_and_grad(Tensors students, Tensors teachers, Tensor weights, OptionalTensor keep,
                                                    int64_t distance, int64_t resize) {
  STD_TORCH_CHECK(weights.is_contiguous(), "pathways: weights must be contiguous");
  Result result = run(Call{students, teachers, keep, distance, resize, &weights, true, false});
  return {result.distances, std::move(result.student_grads)};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("pathways", TORCH_BOX(&kdfast::cpu::pathways));
  m.impl("pathways_backward", TORCH_BOX(&kdfast::cpu::pathways_backward));
  m.impl("pathways_value_and_grad", TORCH_BOX(&kdfast::cpu::pathways_value_and_grad));
}
