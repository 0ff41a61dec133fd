// How CPU kernels sweep a list of tensors: cut into pieces of at most kPiece elements, over which threads are spread.
#pragma once

#include <algorithm>
#include <vector>

#include "../stable.h"
#include "gradients.h"

namespace kdfast::cpu {

constexpr int64_t kPiece = 16384;

struct Piece {
  size_t tensor;
  int64_t begin, count;  // elements of that tensor
};

inline std::vector<Piece> cut(const std::vector<Tensor>& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t n = tensors[i].numel();
    for (int64_t begin = 0; begin < n; begin += kPiece) pieces.push_back({i, begin, std::min(kPiece, n - begin)});
  }
  return pieces;
}

// f(piece's number, the piece), for all of them.
template <class F>
void for_each_piece(const std::vector<Piece>& pieces, const F& f) {
  const int64_t n = static_cast<int64_t>(pieces.size());
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, pieces[i]);
  };
  // A thread is worth waking for 32k elements.
  n <= 2 ? some(0, n) : torch::stable::parallel_for(0, n, 2, some);
}

inline void check_lists(const std::vector<Tensor>& theta, const std::vector<Tensor>& others) {
  STD_TORCH_CHECK(theta.size() == others.size(), "lists of tensors must have one length");
  for (size_t i = 0; i < theta.size(); ++i) {
    STD_TORCH_CHECK(theta[i].numel() == others[i].numel() && theta[i].scalar_type() == theta[0].scalar_type() &&
                        others[i].scalar_type() == theta[0].scalar_type(),
                    "lists of tensors must have one type, and tensor by tensor one shape");
  }
}

inline std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& x : tensors) out.push_back(empty_gradient(x));
  return out;
}

template <class T>
T* at(const std::vector<Tensor>& tensors, const Piece& piece) {
  return static_cast<T*>(tensors[piece.tensor].data_ptr()) + piece.begin;
}

}  // namespace kdfast::cpu
