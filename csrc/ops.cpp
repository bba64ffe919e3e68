// The operators as torch knows them: schema, checks, output, workspace. The only file with torch's headers, of which it uses
// the stable ABI alone: one binary serves every torch from TORCH_TARGET_VERSION (setup.py) on, and every Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "lora_kernels/update_args.h"

#if defined(LORA_KERNELS_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "lora_kernels/decode_args.h"

// Weak: a torch without CUDA does not have it, and the module must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace lora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel(int64_t count, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { f(begin, end, context); });
}

void check_update(bool good, const char* what) { STD_TORCH_CHECK(good, "multi_lora_update_: ", what); }

// Y (M, N) += scaling_l X A_l^T B_l^T by row, on a CPU; X, Y, A and B float or bfloat16.
void multi_lora_update_(Tensor Y, const Tensor& X, const Tensor& A, const Tensor& B, const Tensor& starts, const Tensor& ranks,
                        const Tensor& scalings, int64_t max_rank, const Tensor& ids) {
  const ScalarType dtype = X.scalar_type();
  check_update(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "float32 or bfloat16 only");
  for (const Tensor* T : {static_cast<const Tensor*>(&Y), &X, &A, &B}) {
    check_update(T->is_cpu() && T->dim() == 2 && T->scalar_type() == dtype, "Y, X, A and B must be matrices of one dtype on the CPU");
  }
  UpdateArgs args{};
  args.M = X.size(0), args.K = X.size(1), args.N = Y.size(1), args.R = A.size(0), args.L = starts.size(0);
  check_update(Y.size(0) == args.M && A.size(1) == args.K && B.size(0) == args.N && B.size(1) == args.R,
               "expected Y (M, N), X (M, K), A (R, K) and B (N, R)");
  for (const Tensor* T : {static_cast<const Tensor*>(&Y), &X, &A}) {
    check_update(T->size(1) <= 1 || T->stride(1) == 1, "rows of Y, X and A must be of neighbouring elements");
  }
  for (const Tensor* T : {&starts, &ranks, &ids, &scalings}) {
    const int64_t length = T == &ids ? args.M : args.L;
    check_update(T->is_cpu() && T->dim() == 1 && T->size(0) == length && (length <= 1 || T->stride(0) == 1) &&
                     T->scalar_type() == (T == &scalings ? ScalarType::Float : ScalarType::Int),
                 "starts, ranks and ids must be contiguous int32, scalings float32");
  }
  check_update(0 <= max_rank && max_rank <= args.R, "max_rank must be 0 to R");
  args.X = X.const_data_ptr(), args.A = A.const_data_ptr(), args.B = B.const_data_ptr(), args.Y = Y.mutable_data_ptr();
  args.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  args.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  args.ranks = static_cast<const int32_t*>(ranks.const_data_ptr());
  args.scalings = static_cast<const float*>(scalings.const_data_ptr());
  args.half = dtype == ScalarType::BFloat16;
  args.max_rank = max_rank;
  args.stride_xm = X.stride(0), args.stride_ar = A.stride(0), args.stride_ym = Y.stride(0);
  args.stride_bn = B.stride(0), args.stride_br = B.stride(1);
  multi_lora_update(args, parallel);
}

#if defined(LORA_KERNELS_CUDA)
void check_rows(const char* name, const Tensor& T, ScalarType dtype) {  // that 16 bytes of a row can be read at once
  STD_TORCH_CHECK(T.dim() == 2 && T.scalar_type() == dtype, "multi_lora_decode: ", name, " must be a matrix in X's dtype");
  const bool rows = (T.size(1) <= 1 || T.stride(1) == 1) && (T.size(0) <= 1 || T.stride(0) % 8 == 0);
  STD_TORCH_CHECK(rows && reinterpret_cast<uintptr_t>(T.const_data_ptr()) % 16 == 0, "multi_lora_decode: ", name,
                  " must have rows of neighbouring elements that begin on 16 bytes");
}

void check_list(const char* name, const Tensor& T, ScalarType dtype, int64_t length) {
  STD_TORCH_CHECK(T.dim() == 1 && T.size(0) == length && T.scalar_type() == dtype && (length <= 1 || T.stride(0) == 1),
                  "multi_lora_decode: ", name, " must be a contiguous list of ", length, ", ids, starts and ranks of int32");
}

// Counters and partial sums, for one stream: launches that may overlap must not share them. Kept, its counters zeroed once; a
// stream capture has its own, from its graph's pool, with one fill of 64 KiB where the graph first wants it.
Tensor workspace(const Tensor& like, int64_t bytes, int device, void* stream) {
  struct Held {
    unsigned long long capture;
    Tensor memory;
  };
  static std::mutex mutex;
  static auto& held = *new std::map<std::pair<int, std::pair<void*, bool>>, Held>;  // never destroyed: CUDA may be gone by then
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
  STD_TORCH_CHECK(error == cudaSuccess, "multi_lora_decode: ", cudaGetErrorString(error));
  const bool capturing = status == cudaStreamCaptureStatusActive;
  if (!capturing) capture = 0;
  const std::lock_guard lock(mutex);
  const auto key = std::make_pair(device, std::make_pair(stream, capturing));
  const auto found = held.find(key);
  if (found != held.end() && found->second.capture == capture && found->second.memory.numel() >= bytes) {
    return found->second.memory;
  }
  const int64_t size = (bytes + (1 << 20) - 1) >> 20 << 20;
  Tensor memory = torch::stable::new_empty(like, {size}, ScalarType::Byte);
  Tensor counters = torch::stable::narrow(memory, 0, 0, 4 * COUNTERS);
  torch::stable::zero_(counters);
  held.insert_or_assign(key, Held{capture, memory});
  return memory;
}

Tensor multi_lora_decode(const Tensor& X, const Tensor& W, const Tensor& A, const Tensor& B, const Tensor& starts,
                         const Tensor& ranks, const Tensor& scalings, int64_t max_rank, const Tensor& ids,
                         const std::optional<Tensor>& bias) {
  const ScalarType dtype = X.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "multi_lora_decode: bfloat16 or float16 only");
  check_rows("X", X, dtype), check_rows("W", W, dtype), check_rows("A", A, dtype);
  const int64_t M = X.size(0), K = X.size(1), N = W.size(0), R = A.size(0), L = ranks.dim() == 1 ? ranks.size(0) : -1;
  STD_TORCH_CHECK(M <= MAX_TOKENS, "multi_lora_decode: ", M, " tokens; it takes up to ", MAX_TOKENS);
  STD_TORCH_CHECK(W.size(1) == K && A.size(1) == K && K > 0 && K % 8 == 0 && K < INT32_MAX / 2 && N < INT32_MAX / 2,
                  "multi_lora_decode: X (M, K), W (N, K) and A (R, K) must share K, a multiple of 8");
  STD_TORCH_CHECK(B.dim() == 2 && B.size(0) == N && B.size(1) == R && B.scalar_type() == dtype && R < INT32_MAX / 2,
                  "multi_lora_decode: B must be (N, R) in X's dtype, for A of ", R, " rows");
  STD_TORCH_CHECK(0 <= max_rank && max_rank <= R, "multi_lora_decode: max_rank ", max_rank, " with A of ", R, " rows");
  check_list("starts", starts, ScalarType::Int, L), check_list("ranks", ranks, ScalarType::Int, L);
  check_list("scalings", scalings, ScalarType::Float, L), check_list("ids", ids, ScalarType::Int, M);
  if (bias) check_list("bias", *bias, dtype, N);
  const int32_t device = X.get_device();
  for (const Tensor* T : {&W, &A, &B, &starts, &ranks, &scalings, &ids, bias ? &*bias : &W}) {
    STD_TORCH_CHECK(T->is_cuda() && T->get_device() == device, "multi_lora_decode: everything must be on X's device");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor Y = torch::stable::new_empty(X, {M, N});
  if (M == 0 || N == 0) return Y;

  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "multi_lora_decode: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  DecodeArgs args{};
  args.X = X.const_data_ptr(), args.W = W.const_data_ptr(), args.A = A.const_data_ptr(), args.B = B.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.Y = Y.mutable_data_ptr();
  args.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  args.ranks = static_cast<const int32_t*>(ranks.const_data_ptr());
  args.scalings = static_cast<const float*>(scalings.const_data_ptr());
  args.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  args.M = int32_t(M), args.N = int32_t(N), args.K = int32_t(K), args.R = int32_t(R), args.L = int32_t(L);
  args.max_rank = int32_t(max_rank);
  args.stride_xm = X.stride(0), args.stride_wn = W.stride(0), args.stride_ar = A.stride(0), args.stride_ym = N;
  args.stride_bn = B.stride(0), args.stride_br = B.stride(1);
  args.y_vector = N % 8 == 0;
  args.b_vector = N % 8 == 0 && args.stride_bn == 1 && args.stride_br % 8 == 0 && reinterpret_cast<uintptr_t>(args.B) % 16 == 0;
  const bool bfloat16 = dtype == ScalarType::BFloat16;
  int blocks = 0;
  const char* problem = decode_blocks(args, bfloat16, device, &blocks);
  if (!problem) {
    const int64_t bytes = workspace_bytes(args.M, args.K, args.max_rank, blocks);
    const Tensor memory = workspace(X, bytes, device, stream);  // held until the launch is in the stream
    problem = launch_decode(args, bfloat16, memory.mutable_data_ptr(), bytes, device, stream);
  }
  STD_TORCH_CHECK(!problem, "multi_lora_decode: ", problem);
  return Y;
}
#endif

}  // namespace
}  // namespace lora

#if defined(LORA_KERNELS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) { m.impl("multi_lora_decode", TORCH_BOX(&lora::multi_lora_decode)); }
constexpr int WITH_CUDA = 1;
#else
constexpr int WITH_CUDA = 0;
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels, m) {
  m.def(
      "multi_lora_decode(Tensor X, Tensor W, Tensor A, Tensor B, Tensor starts, Tensor ranks, Tensor scalings, int max_rank, "
      "Tensor ids, Tensor? bias) -> Tensor");
  m.def(
      "multi_lora_update_(Tensor(a!) Y, Tensor X, Tensor A, Tensor B, Tensor starts, Tensor ranks, Tensor scalings, int max_rank, "
      "Tensor ids) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) { m.impl("multi_lora_update_", TORCH_BOX(&lora::multi_lora_update_)); }

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) {
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddIntConstant(made, "WITH_CUDA", WITH_CUDA);
  return made;
}
