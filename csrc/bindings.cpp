// The only file that sees torch: each operation checks its tensors, allocates its results and calls a backend's launcher.
// Built on libtorch's stable ABI, so one build runs on torch 2.11 and later; registered as torch.ops.minireft.NAME for CPU
// and CUDA tensors, and once more, for CPU tensors, as torch.ops.minireft_emulator.NAME: the CUDA sources run on the CPU.
// Users call minireft.ops; what is here knows nothing of gradients beyond offering the backward operations.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "launchers.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace minireft {
namespace {

using torch::stable::Tensor;
using Scalar = torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

struct Backend {
  const char* name;
  decltype(&cpu::low_rank_edit) low_rank_edit;
  decltype(&cpu::low_rank_edit_backward) low_rank_edit_backward;
  decltype(&cpu::low_rank_edit_workspace) low_rank_edit_workspace;
  decltype(&cpu::scale) scale;
  decltype(&cpu::scale_backward) scale_backward;
  decltype(&cpu::scale_workspace) scale_workspace;
  decltype(&cpu::noisy_embedding) noisy_embedding;
  decltype(&cpu::noisy_embedding_backward) noisy_embedding_backward;
  decltype(&cpu::noisy_embedding_workspace) noisy_embedding_workspace;
};

#define MINIREFT_BACKEND_TABLE(ns)                                                                        \
  {#ns, ns::low_rank_edit, ns::low_rank_edit_backward, ns::low_rank_edit_workspace, ns::scale,            \
   ns::scale_backward, ns::scale_workspace, ns::noisy_embedding, ns::noisy_embedding_backward,            \
   ns::noisy_embedding_workspace}

// ---- checks: every message names the argument, what was expected and what came ---------------------------------------

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

std::string text(const int64_t* sizes, size_t n) {
  std::string s = "(";
  for (size_t i = 0; i < n; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + (n == 1 ? ",)" : ")");
}

std::string text(Scalar dtype) {
  switch (dtype) {
    case Scalar::Float: return "float32";
    case Scalar::Half: return "float16";
    case Scalar::BFloat16: return "bfloat16";
    case Scalar::Double: return "float64";
    case Scalar::Long: return "int64";
    case Scalar::Int: return "int32";
    default: return torch::headeronly::toString(dtype);
  }
}

[[noreturn]] void fail_shape(const Tensor& t, const char* name, const std::string& expected) {
  fail(std::string(name) + " must have shape " + expected + ", got " + text(t.sizes().data(), t.dim()));
}

[[noreturn]] void fail_dtype(const Tensor& t, const char* name, const std::string& expected) {
  fail(std::string(name) + " must " + expected + ", got " + text(t.scalar_type()));
}

void expect(const Tensor& t, const char* name, const Sizes& sizes) {
  const auto got = t.sizes();
  bool same = got.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = got[i] == sizes[i];
  if (!same) fail_shape(t, name, text(sizes.data(), sizes.size()));
}

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case Scalar::Float: return Dtype::f32;
    case Scalar::Half: return Dtype::f16;
    case Scalar::BFloat16: return Dtype::bf16;
    case Scalar::Double: return Dtype::f64;
    default: fail_dtype(t, name, "be float32, bfloat16, float16 or float64");
  }
}

Dtype weight_dtype_of(const Tensor& t, const char* name, Dtype activations) {
  const Dtype d = dtype_of(t, name);
  const bool fits = d == activations || (d == Dtype::f32 && activations != Dtype::f64);
  if (!fits) fail_dtype(t, name, "be float32 or have the dtype of the activations");
  return d;
}

void expect_index(const Tensor& t, const char* name) {
  if (t.scalar_type() != Scalar::Long) fail_dtype(t, name, "be int64");
}

void same_device(const Tensor& a, const Tensor& b, const char* name) {
  if (a.is_cpu() != b.is_cpu() || a.get_device_index() != b.get_device_index())
    fail(std::string(name) + " must be on the device of the first argument");
}

void same_dtype(const Tensor& t, const char* name, const Tensor& like, const char* of) {
  if (t.scalar_type() != like.scalar_type())
    fail_dtype(t, name, std::string("have the dtype of ") + of + ", " + text(like.scalar_type()));
}

// ---- tensors as the launchers want them ------------------------------------------------------------------------------

int64_t product(const int64_t* sizes, int64_t begin, int64_t end) {
  int64_t n = 1;
  for (int64_t i = begin; i < end; ++i) n *= sizes[i];
  return n;
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Dimensions [begin, end) as one: true if a single stride addresses them.
bool one_stride(const Tensor& t, int64_t begin, int64_t end, int64_t& stride) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t span = -1;
  stride = 0;
  for (int64_t i = end - 1; i >= begin; --i) {
    if (sizes[i] == 1) continue;
    if (span < 0) stride = strides[i];
    else if (strides[i] != span) return false;
    span = strides[i] * sizes[i];
  }
  return true;
}

// t (..., C) seen as (B, T, C) with dimensions [0, split) in B; layouts that this cannot say are copied first.
struct Rows {
  Tensor tensor;
  Stream stream;
  Rows() : stream{nullptr, 0, 0} {}
  Rows(const Tensor& t, int64_t split) : tensor(t) {
    const int64_t last = t.dim() - 1;
    const bool fits = (t.stride(last) == 1 || t.size(last) == 1) &&
                      one_stride(t, 0, split, stream.batch_stride) && one_stride(t, split, last, stream.token_stride);
    if (!fits) {
      tensor = torch::stable::contiguous(t);
      one_stride(tensor, 0, split, stream.batch_stride);
      one_stride(tensor, split, last, stream.token_stride);
    }
    stream.data = tensor.data_ptr();
  }
};

struct Shape {  // of an activation tensor (..., C) split into B, T and C
  int64_t split, B, T, C;
  Shape(const Tensor& t, const char* name, bool per_row) {
    if (t.dim() < (per_row ? 2 : 1)) fail_shape(t, name, per_row ? "(B, ..., C)" : "(..., C)");
    const auto sizes = t.sizes();
    split = per_row ? 1 : (t.dim() >= 2 ? t.dim() - 2 : 0);
    B = product(sizes.data(), 0, split);
    T = product(sizes.data(), split, t.dim() - 1);
    C = sizes[t.dim() - 1];
  }
};

size_t bytes_of(Scalar dtype) {
  return dtype == Scalar::Double ? 8 : dtype == Scalar::Float ? 4 : dtype == Scalar::Byte ? 1 : 2;
}

Tensor empty(const Tensor& like, const Sizes& sizes, Scalar dtype) {
  Sizes strides(sizes.size());
  int64_t numel = 1;
  for (size_t i = sizes.size(); i-- > 0; numel *= sizes[i]) strides[i] = numel > 0 ? numel : 1;
  const size_t bytes = numel * bytes_of(dtype);
  if (bytes >= cpu::LEAST_BLOCK && like.is_cpu())
    if (void* data = cpu::blocks().take(bytes))
      return torch::stable::from_blob(data, sizes, strides, like.device(), dtype, [](void* p) { cpu::blocks().give(p); });
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const torch::headeronly::IntHeaderOnlyArrayRef& sizes) {
  return empty(like, Sizes(sizes.begin(), sizes.end()), like.scalar_type());
}

Tensor workspace(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, Scalar::Byte); }

Index index_of(const std::optional<Tensor>& t) {  // (B,) or (B, P), any strides
  if (!t) return {nullptr, 0, 0};
  return {(const int64_t*)t->data_ptr(), t->stride(0), t->dim() == 2 ? t->stride(1) : 0};
}

// The values of an index on the CPU, checked before anything is written: low ≤ value < high.
void check_range(const std::optional<Tensor>& t, const char* name, int64_t low, int64_t high) {
  if (!t || !t->is_cpu()) return;
  const Index i = index_of(t);
  const int64_t B = t->size(0), P = t->dim() == 2 ? t->size(1) : 1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t v = i.data[b * i.stride_b + p * i.stride_p];
      if (v < low || v >= high) {
        std::ostringstream s;
        s << name << " must lie in " << (low < 0 ? "−1" : "0") << " … " << high - 1 << ", got " << v;
        fail(s.str());
      }
    }
}

void check_distinct(const Tensor& positions, int64_t T) {
  if (!positions.is_cpu()) return;
  const Index i = index_of(positions);
  const int64_t B = positions.size(0), P = positions.size(1);
  std::vector<int64_t> seen(T, -1);  // the last row that named this position
  for (int64_t b = 0; b < B; ++b)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t t = i.data[b * i.stride_b + p * i.stride_p];
      if (t < 0) continue;
      if (seen[t] == b) {
        std::ostringstream s;
        s << "positions must be distinct within a row, got " << t << " twice in row " << b;
        fail(s.str());
      }
      seen[t] = b;
    }
}

// ---- running -----------------------------------------------------------------------------------------------------------

void* enter(const Tensor& t, std::optional<torch::stable::accelerator::DeviceGuard>& guard) {
  if (t.is_cpu()) return nullptr;
  guard.emplace(t.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

#define MINIREFT_RUN(like, call)                                        \
  do {                                                                  \
    std::optional<torch::stable::accelerator::DeviceGuard> guard;       \
    void* stream = enter(like, guard);                                  \
    if (const char* problem = (call)) throw std::runtime_error(problem); \
  } while (0)

void parallel_over_torch_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
}

// ---- low-rank edit -----------------------------------------------------------------------------------------------------

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Optional = std::optional<Tensor>;

struct Weights {
  Tensor down, up, bias;
  int64_t K, r;
  Weights(const Tensor& d, const Tensor& u, const Optional& b, const Tensor& h, int64_t C, bool banks) {
    if (d.dim() != (banks ? 3 : 2)) fail_shape(d, "down", banks ? "(K, r, C)" : "(r, C)");
    K = banks ? d.size(0) : 1, r = d.size(banks ? 1 : 0);
    const Sizes wide = banks ? Sizes{K, r, C} : Sizes{r, C};
    weight_dtype_of(d, "down", dtype_of(h, "h"));
    expect(d, "down", wide), expect(u, "up", wide);
    same_device(h, d, "down"), same_device(h, u, "up");
    same_dtype(u, "up", d, "down");
    down = packed(d), up = packed(u);
    if (!b) return;
    expect(*b, "bias", banks ? Sizes{K, r} : Sizes{r});
    same_device(h, *b, "bias");
    same_dtype(*b, "bias", d, "down");
    bias = packed(*b);
  }
};

Edit edit_of(const Tensor& h, const Weights& w, int64_t B, int64_t T, int64_t C, const Optional& positions,
             const Optional& tasks) {
  Edit e{B, T, C, T, w.r, w.K, {nullptr, 0, 0}, {nullptr, 0, 0}, dtype_of(h, "h"), dtype_of(w.down, "down")};
  if (positions) {
    expect_index(*positions, "positions"), same_device(h, *positions, "positions");
    if (positions->dim() != 2) fail_shape(*positions, "positions", "(B, P)");
    e.P = positions->size(1);
    expect(*positions, "positions", {B, e.P});
    e.positions = index_of(positions);
    check_range(positions, "positions", -1, T);
    check_distinct(*positions, T);
  }
  if (tasks) {
    expect_index(*tasks, "tasks"), same_device(h, *tasks, "tasks");
    expect(*tasks, "tasks", tasks->dim() == 2 ? Sizes{B, e.P} : Sizes{B});
    e.tasks = index_of(tasks);
    check_range(tasks, "tasks", -1, w.K);
  }
  return e;
}

Scalar delta_scalar(const Tensor& h) { return h.scalar_type() == Scalar::Double ? Scalar::Double : Scalar::Float; }

template <const Backend& K>
Two low_rank_edit(const Tensor& h, const Tensor& down, const Tensor& up, const Tensor& bias) {
  const Shape s(h, "h", false);
  const Weights w(down, up, bias, h, s.C, false);
  const Edit e = edit_of(h, w, s.B, s.T, s.C, std::nullopt, std::nullopt);
  Tensor out = empty(h, h.sizes()), delta = empty(h, {s.B * s.T, w.r}, delta_scalar(h));
  const Rows from(h, s.split), to(out, s.split);
  const EditForward f{from.stream, to.stream, w.down.data_ptr(), w.up.data_ptr(), w.bias.data_ptr(), nullptr,
                      delta.data_ptr()};
  MINIREFT_RUN(h, K.low_rank_edit(e, f, stream));
  return {out, delta};
}

// Edits `h` (B, T, C) itself; rows and delta are what backward needs, empty when it is not wanted.
template <const Backend& K>
Two low_rank_edit_at_(Tensor h, const Tensor& positions, const Tensor& down, const Tensor& up, const Tensor& bias,
                      const Optional& tasks, bool save) {
  if (h.dim() != 3) fail_shape(h, "h", "(B, T, C)");
  const int64_t B = h.size(0), T = h.size(1), C = h.size(2);
  if (C > 1 && h.numel() > 0 && h.stride(2) != 1)
    fail("h must have last stride 1 to be edited in place, got " + std::to_string(h.stride(2)));
  if ((B > 1 && h.stride(0) == 0) || (T > 1 && h.stride(1) == 0))
    fail("h must have memory for each row to be edited in place, got an expanded tensor: clone it first");
  const Weights w(down, up, bias, h, C, tasks.has_value());
  const Edit e = edit_of(h, w, B, T, C, positions, tasks);
  const int64_t N = save ? B * e.P : 0;
  Tensor rows = empty(h, {N, C}, h.scalar_type()), delta = empty(h, {N, w.r}, delta_scalar(h));
  const Stream stream_h{h.data_ptr(), h.stride(0), h.stride(1)};
  const EditForward f{stream_h, stream_h, w.down.data_ptr(), w.up.data_ptr(), w.bias.data_ptr(),
                      save ? rows.data_ptr() : nullptr, save ? delta.data_ptr() : nullptr};
  MINIREFT_RUN(h, K.low_rank_edit(e, f, stream));
  return {rows, delta};
}

template <const Backend& K>
Three low_rank_edit_at(const Tensor& h, const Tensor& positions, const Tensor& down, const Tensor& up, const Tensor& bias,
                       const Optional& tasks, bool save) {
  dtype_of(h, "h");
  Tensor out = empty(h, h.sizes());
  torch::stable::copy_(out, h);
  auto [rows, delta] = low_rank_edit_at_<K>(out, positions, down, up, bias, tasks, save);
  return {out, rows, delta};
}

struct Gradients {  // of the weights: allocated when wanted, empty otherwise
  Tensor down, up, bias;
  bool wanted;
  Gradients(const Weights& w, bool wanted) : wanted(wanted) {
    const auto sizes = w.down.sizes();
    const Sizes none{0};
    Sizes whole(sizes.begin(), sizes.end()), flat(sizes.begin(), sizes.end() - 1);
    const Scalar dtype = w.down.scalar_type();
    down = empty(w.down, wanted ? whole : none, dtype), up = empty(w.down, wanted ? whole : none, dtype);
    bias = empty(w.down, wanted ? flat : none, dtype);
  }
  void* pointer(const Tensor& t) const { return wanted ? t.data_ptr() : nullptr; }
};

template <const Backend& K>
Four low_rank_edit_backward(const Tensor& g, const Tensor& h, const Tensor& delta, const Tensor& down, const Tensor& up,
                            bool want_h, bool want_weights) {
  const Shape s(h, "h", false);
  const auto sizes = h.sizes();
  expect(g, "g", Sizes(sizes.begin(), sizes.end())), same_device(h, g, "g"), same_dtype(g, "g", h, "h");
  const Weights w(down, up, std::nullopt, h, s.C, false);
  expect(delta, "delta", {s.B * s.T, w.r});
  const Edit e = edit_of(h, w, s.B, s.T, s.C, std::nullopt, std::nullopt);
  Tensor dh = want_h ? empty(h, sizes) : empty(h, {0}, h.scalar_type());
  const Gradients d(w, want_weights);
  const Rows from(g, s.split), read(h, s.split), to = want_h ? Rows(dh, s.split) : Rows();
  Tensor space = workspace(h, K.low_rank_edit_workspace(e));
  const EditBackward f{from.stream, read.stream, nullptr, delta.data_ptr(), w.down.data_ptr(), w.up.data_ptr(), to.stream,
                       d.pointer(d.down), d.pointer(d.up), d.pointer(d.bias), space.data_ptr()};
  MINIREFT_RUN(h, K.low_rank_edit_backward(e, f, stream));
  return {dh, d.down, d.up, d.bias};
}

template <const Backend& K>
Four low_rank_edit_at_backward(const Tensor& g, const Tensor& rows, const Tensor& delta, const Tensor& positions,
                               const Tensor& down, const Tensor& up, const Optional& tasks, bool want_h,
                               bool want_weights) {
  if (g.dim() != 3) fail_shape(g, "g", "(B, T, C)");
  const int64_t B = g.size(0), T = g.size(1), C = g.size(2);
  const Weights w(down, up, std::nullopt, g, C, tasks.has_value());
  const Edit e = edit_of(g, w, B, T, C, positions, tasks);
  expect(rows, "rows", {B * e.P, C}), expect(delta, "delta", {B * e.P, w.r}), same_dtype(rows, "rows", g, "g");
  Tensor dh = want_h ? empty(g, g.sizes()) : empty(g, {0}, g.scalar_type());
  if (want_h) torch::stable::copy_(dh, g);
  const Gradients d(w, want_weights);
  const Rows from(g, 1), to = want_h ? Rows(dh, 1) : Rows();
  Tensor space = workspace(g, K.low_rank_edit_workspace(e));
  const EditBackward f{from.stream, {nullptr, 0, 0}, rows.data_ptr(), delta.data_ptr(), w.down.data_ptr(), w.up.data_ptr(),
                       to.stream, d.pointer(d.down), d.pointer(d.up), d.pointer(d.bias), space.data_ptr()};
  MINIREFT_RUN(g, K.low_rank_edit_backward(e, f, stream));
  return {dh, d.down, d.up, d.bias};
}

// ---- scales ------------------------------------------------------------------------------------------------------------

const char* name_of_x(int64_t activation) {  // in the signature that the user sees
  return activation == (int64_t)Activation::swiglu ? "gate" : activation ? "u" : "x";
}

Scale scale_of(const Tensor& x, const Shape& s, const Tensor& l, const char* name, const Optional& tasks,
               int64_t activation) {
  if (l.dim() != (tasks ? 2 : 1)) fail_shape(l, name, tasks ? "(K, C)" : "(C,)");
  const int64_t banks = tasks ? l.size(0) : 1;
  expect(l, name, tasks ? Sizes{banks, s.C} : Sizes{s.C});
  same_device(x, l, name);
  const Dtype dtype = dtype_of(x, name_of_x(activation));
  Scale z{s.B, s.T, banks, {nullptr, 0, 0}, (Activation)activation, dtype, weight_dtype_of(l, name, dtype)};
  if (tasks) {
    expect_index(*tasks, "tasks"), same_device(x, *tasks, "tasks"), expect(*tasks, "tasks", {s.B});
    z.tasks = index_of(tasks);
    check_range(tasks, "tasks", -1, banks);
  }
  return z;
}

void expect_like(const Tensor& t, const char* name, const Tensor& like, const char* of) {
  const auto sizes = like.sizes();
  expect(t, name, Sizes(sizes.begin(), sizes.end())), same_device(like, t, name), same_dtype(t, name, like, of);
}

template <const Backend& K>
Tensor scale(const Tensor& x, const Optional& up, const Tensor& l, const Optional& tasks, int64_t activation) {
  const Shape s(x, name_of_x(activation), tasks.has_value());
  const Scale z = scale_of(x, s, l, "l", tasks, activation);
  if (up) expect_like(*up, "up", x, "gate");
  Tensor out = empty(x, x.sizes());
  const Tensor vector = packed(l);
  const Rows from(x, s.split), gated = up ? Rows(*up, s.split) : Rows(), to(out, s.split);
  const ScaleForward f{s.C, from.stream, gated.stream, to.stream, vector.data_ptr()};
  MINIREFT_RUN(x, K.scale(z, &f, 1, stream));
  return out;
}

template <const Backend& K>
Three scale_backward(const Tensor& g, const Tensor& x, const Optional& up, const Tensor& l, const Optional& tasks,
                     int64_t activation, bool want_l) {
  const Shape s(x, name_of_x(activation), tasks.has_value());
  const Scale z = scale_of(x, s, l, "l", tasks, activation);
  expect_like(g, "g", x, name_of_x(activation));
  if (up) expect_like(*up, "up", x, "gate");
  Tensor dx = empty(x, x.sizes()), dup = up ? empty(x, x.sizes()) : empty(x, {0}, x.scalar_type());
  Tensor dl = want_l ? empty(l, l.sizes()) : empty(l, {0}, l.scalar_type());
  const Tensor vector = packed(l);
  const Rows gradient(g, s.split), from(x, s.split), gated = up ? Rows(*up, s.split) : Rows(), to(dx, s.split),
      to_gated = up ? Rows(dup, s.split) : Rows();
  Tensor space = workspace(x, K.scale_workspace(z, s.C));
  const ScaleBackward f{s.C, gradient.stream, from.stream, gated.stream, to.stream, to_gated.stream, vector.data_ptr(),
                        want_l ? dl.data_ptr() : nullptr, space.data_ptr()};
  MINIREFT_RUN(x, K.scale_backward(z, &f, 1, stream));
  return {dx, dup, dl};
}

void check_pair(const Shape& a, const Shape& b, const Tensor& x, const Tensor& y, const Tensor& l_x, const Tensor& l_y) {
  if (a.B != b.B || a.T != b.T) fail_shape(y, "y", "that of x, " + text(x.sizes().data(), x.dim()) + ", but for C");
  if (l_x.dim() == 2 && l_x.size(0) != l_y.size(0)) expect(l_y, "l_y", {l_x.size(0), b.C});
  same_device(x, y, "y"), same_dtype(y, "y", x, "x"), same_dtype(l_y, "l_y", l_x, "l_x");
}

template <const Backend& K>
Two scale_pair(const Tensor& x, const Tensor& y, const Tensor& l_x, const Tensor& l_y, const Optional& tasks) {
  const Shape s(x, "x", tasks.has_value()), q(y, "y", tasks.has_value());
  const Scale z = scale_of(x, s, l_x, "l_x", tasks, 0);
  scale_of(y, q, l_y, "l_y", tasks, 0), check_pair(s, q, x, y, l_x, l_y);
  Tensor a = empty(x, x.sizes()), b = empty(y, y.sizes());
  const Tensor v = packed(l_x), w = packed(l_y);
  const Rows from_x(x, s.split), from_y(y, q.split), to_x(a, s.split), to_y(b, q.split);
  const ScaleForward f[2] = {{s.C, from_x.stream, {nullptr, 0, 0}, to_x.stream, v.data_ptr()},
                             {q.C, from_y.stream, {nullptr, 0, 0}, to_y.stream, w.data_ptr()}};
  MINIREFT_RUN(x, K.scale(z, f, 2, stream));
  return {a, b};
}

template <const Backend& K>
Four scale_pair_backward(const Tensor& g_x, const Tensor& g_y, const Tensor& x, const Tensor& y, const Tensor& l_x,
                         const Tensor& l_y, const Optional& tasks) {
  const Shape s(x, "x", tasks.has_value()), q(y, "y", tasks.has_value());
  const Scale z = scale_of(x, s, l_x, "l_x", tasks, 0), zy = scale_of(y, q, l_y, "l_y", tasks, 0);
  expect_like(g_x, "g_x", x, "x"), expect_like(g_y, "g_y", y, "y"), check_pair(s, q, x, y, l_x, l_y);
  Tensor dx = empty(x, x.sizes()), dy = empty(y, y.sizes()), dl_x = empty(l_x, l_x.sizes()), dl_y = empty(l_y, l_y.sizes());
  const Tensor v = packed(l_x), w = packed(l_y);
  const Rows gx(g_x, s.split), gy(g_y, q.split), from_x(x, s.split), from_y(y, q.split), to_x(dx, s.split), to_y(dy, q.split);
  Tensor space_x = workspace(x, K.scale_workspace(z, s.C)), space_y = workspace(x, K.scale_workspace(zy, q.C));
  const Stream none{nullptr, 0, 0};
  const ScaleBackward f[2] = {
      {s.C, gx.stream, from_x.stream, none, to_x.stream, none, v.data_ptr(), dl_x.data_ptr(), space_x.data_ptr()},
      {q.C, gy.stream, from_y.stream, none, to_y.stream, none, w.data_ptr(), dl_y.data_ptr(), space_y.data_ptr()}};
  MINIREFT_RUN(x, K.scale_backward(z, f, 2, stream));
  return {dx, dy, dl_x, dl_y};
}

// ---- noisy embedding ---------------------------------------------------------------------------------------------------

template <const Backend& K>
Tensor noisy_embedding(const Tensor& ids, const Tensor& weight, double alpha, const Tensor& seed, const Optional& lengths,
                       const Optional& rows, const Optional& index, bool normal) {
  if (ids.dim() != 2) fail_shape(ids, "ids", "(B, T)");
  if (weight.dim() != 2) fail_shape(weight, "weight", "(V, C)");
  const int64_t B = ids.size(0), T = ids.size(1), V = weight.size(0), C = weight.size(1);
  const Dtype dtype = dtype_of(weight, "weight");
  expect_index(ids, "ids"), expect_index(seed, "seed"), expect(seed, "seed", {2});
  same_device(ids, weight, "weight"), same_device(ids, seed, "seed");
  const auto optional = [&](const Optional& t, const char* name, bool may_be_flat) {
    if (!t) return;
    expect_index(*t, name), same_device(ids, *t, name);
    expect(*t, name, may_be_flat && t->dim() == 1 ? Sizes{B} : Sizes{B, T});
  };
  optional(lengths, "lengths", true), optional(rows, "rows", true), optional(index, "index", false);
  check_range(ids, "ids", 0, V);
  const Tensor table = packed(weight), key = packed(seed);
  // Lengths per token keep a stride of their own, so that they are never taken for lengths per row.
  const Optional spans = lengths && lengths->dim() == 2 ? Optional(packed(*lengths)) : lengths;
  Tensor out = empty(weight, {B, T, C}, weight.scalar_type());
  const Noise n{B, T, C, V, index_of(ids), index_of(spans), index_of(rows), index_of(index),
                (const int64_t*)key.data_ptr(), (float)alpha, normal, dtype};
  const NoiseForward f{table.data_ptr(), out.data_ptr()};
  MINIREFT_RUN(ids, K.noisy_embedding(n, f, stream));
  return out;
}

// order (B·T,): the tokens sorted by id, stably.
template <const Backend& K>
Tensor noisy_embedding_backward(const Tensor& g, const Tensor& ids, const Tensor& order, int64_t vocab) {
  if (g.dim() != 3) fail_shape(g, "g", "(B, T, C)");
  const int64_t B = g.size(0), T = g.size(1), C = g.size(2);
  expect(ids, "ids", {B, T}), expect(order, "order", {B * T}), expect_index(ids, "ids"), expect_index(order, "order");
  same_device(g, ids, "ids"), same_device(g, order, "order");
  Tensor dweight = empty(g, {vocab, C}, g.scalar_type());
  const Rows from(g, 1);
  const Tensor sorted = packed(order);
  const Noise n{B, T, C, vocab, index_of(ids), {}, {}, {}, nullptr, 0, false, dtype_of(g, "g")};
  Tensor space = workspace(g, K.noisy_embedding_workspace(n));
  const NoiseBackward f{from.stream, (const int64_t*)sorted.data_ptr(), dweight.data_ptr(), space.data_ptr()};
  MINIREFT_RUN(g, K.noisy_embedding_backward(n, f, stream));
  return dweight;
}

// ---- registration ------------------------------------------------------------------------------------------------------

void define(torch::stable::detail::StableLibrary& m) {
  m.def("low_rank_edit(Tensor h, Tensor down, Tensor up, Tensor bias) -> (Tensor, Tensor)");
  m.def("low_rank_edit_backward(Tensor g, Tensor h, Tensor delta, Tensor down, Tensor up, bool want_h, "
        "bool want_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("low_rank_edit_at(Tensor h, Tensor positions, Tensor down, Tensor up, Tensor bias, Tensor? tasks, bool save) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("low_rank_edit_at_(Tensor(a!) h, Tensor positions, Tensor down, Tensor up, Tensor bias, Tensor? tasks, "
        "bool save) -> (Tensor, Tensor)");
  m.def("low_rank_edit_at_backward(Tensor g, Tensor rows, Tensor delta, Tensor positions, Tensor down, Tensor up, "
        "Tensor? tasks, bool want_h, bool want_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("scale(Tensor x, Tensor? up, Tensor l, Tensor? tasks, int activation) -> Tensor");
  m.def("scale_backward(Tensor g, Tensor x, Tensor? up, Tensor l, Tensor? tasks, int activation, bool want_l) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("scale_pair(Tensor x, Tensor y, Tensor l_x, Tensor l_y, Tensor? tasks) -> (Tensor, Tensor)");
  m.def("scale_pair_backward(Tensor g_x, Tensor g_y, Tensor x, Tensor y, Tensor l_x, Tensor l_y, Tensor? tasks) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("noisy_embedding(Tensor ids, Tensor weight, float alpha, Tensor seed, Tensor? lengths, Tensor? rows, "
        "Tensor? index, bool normal) -> Tensor");
  m.def("noisy_embedding_backward(Tensor g, Tensor ids, Tensor order, int vocab) -> Tensor");
}

template <const Backend& K>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("low_rank_edit", TORCH_BOX(low_rank_edit<K>));
  m.impl("low_rank_edit_backward", TORCH_BOX(low_rank_edit_backward<K>));
  m.impl("low_rank_edit_at", TORCH_BOX(low_rank_edit_at<K>));
  m.impl("low_rank_edit_at_", TORCH_BOX(low_rank_edit_at_<K>));
  m.impl("low_rank_edit_at_backward", TORCH_BOX(low_rank_edit_at_backward<K>));
  m.impl("scale", TORCH_BOX(scale<K>));
  m.impl("scale_backward", TORCH_BOX(scale_backward<K>));
  m.impl("scale_pair", TORCH_BOX(scale_pair<K>));
  m.impl("scale_pair_backward", TORCH_BOX(scale_pair_backward<K>));
  m.impl("noisy_embedding", TORCH_BOX(noisy_embedding<K>));
  m.impl("noisy_embedding_backward", TORCH_BOX(noisy_embedding_backward<K>));
}

constexpr Backend on_cpu = MINIREFT_BACKEND_TABLE(cpu);
#ifdef MINIREFT_WITH_CUDA
constexpr Backend on_cuda = MINIREFT_BACKEND_TABLE(cuda);
#endif
#ifdef MINIREFT_WITH_EMULATOR
constexpr Backend on_emulator = MINIREFT_BACKEND_TABLE(emulated);
#endif

}  // namespace
}  // namespace minireft

STABLE_TORCH_LIBRARY(minireft, m) {
  minireft::cpu::parallel_for = minireft::parallel_over_torch_threads;
  minireft::define(m);
}
STABLE_TORCH_LIBRARY_IMPL(minireft, CPU, m) { minireft::implement<minireft::on_cpu>(m); }
#ifdef MINIREFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(minireft, CUDA, m) { minireft::implement<minireft::on_cuda>(m); }
#endif
#ifdef MINIREFT_WITH_EMULATOR
STABLE_TORCH_LIBRARY(minireft_emulator, m) { minireft::define(m); }
STABLE_TORCH_LIBRARY_IMPL(minireft_emulator, CPU, m) { minireft::implement<minireft::on_emulator>(m); }
#endif
