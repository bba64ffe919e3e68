// The launch of decode.cuh: which kernel, with how many stages and blocks, asked of the device once and then looked up.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "lora_kernels/decode.cuh"

namespace lora {
namespace {

struct Kernel {
  const void* function;
  int threads, stages, shared, resident;  // shared: bytes a block; resident: blocks on the whole device
};

struct Functions {
  const void *async, *bulk;
};

template <class Number, int TOKENS>
Functions functions() {
  return {reinterpret_cast<const void*>(&decode_kernel<Number, AsyncRing, TOKENS>),
          reinterpret_cast<const void*>(&decode_kernel<Number, BulkRing, TOKENS>)};
}

template <class Number>
Functions functions(int width) {
  return width == 8 ? functions<Number, 8>() : width == 16 ? functions<Number, 16>()
       : width == 32 ? functions<Number, 32>() : functions<Number, 64>();
}

const char* text(cudaError_t error) {
  cudaGetLastError();  // an error that was returned is not to be found again by the next who asks
  return cudaGetErrorString(error);
}

#define LORA_TRY(call)                                                    \
  do {                                                                    \
    if (const cudaError_t error = (call); error != cudaSuccess) return text(error); \
  } while (0)

const char* prepare(Kernel& kernel, bool bfloat16, int width, int device) {
  const Functions found = bfloat16 ? functions<gpu::Bfloat16>(width) : functions<gpu::Half>(width);
  cudaFuncAttributes attributes;
  LORA_TRY(cudaFuncGetAttributes(&attributes, found.bulk));
  const bool bulk = attributes.ptxVersion >= 90;  // what this device runs was compiled for bulk copies
  kernel.function = bulk ? found.bulk : found.async;
  kernel.threads = bulk ? BulkRing<8>::THREADS : AsyncRing<8>::THREADS;
  int shared = 0, units = 0, cooperative = 0, resident = 0;
  LORA_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LORA_TRY(cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device));
  LORA_TRY(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  if (!cooperative) return "this device has no cooperative launches";
  kernel.stages = std::min((shared - stages_at(width)) / stage_bytes(width), MAX_STAGES);
  if (kernel.stages < 2) return "this device has too little shared memory a block";
  kernel.shared = shared_bytes(width, kernel.stages);
  LORA_TRY(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared));
  LORA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel.function, kernel.threads, kernel.shared));
  kernel.resident = resident * units;
  return kernel.resident ? nullptr : "no block of this kernel fits this device";
}

const char* find(Kernel& kernel, bool bfloat16, int width, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<bool, int, int>, Kernel> kernels;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(bfloat16, width, device);
  if (const auto found = kernels.find(key); found != kernels.end()) {
    kernel = found->second;
    return nullptr;
  }
  if (const char* error = prepare(kernel, bfloat16, width, device)) return error;
  kernels.emplace(key, kernel);
  return nullptr;
}

int blocks_of(const DecodeArgs& args, const Kernel& kernel) {
  return int(std::min<int64_t>(kernel.resident, int64_t(tiles_of(args.N)) * k_units(args.K)));
}

}  // namespace

const char* decode_blocks(const DecodeArgs& args, bool bfloat16, int device, int* blocks) {
  Kernel kernel{};
  const char* error = find(kernel, bfloat16, width_of(args.M), device);
  *blocks = blocks_of(args, kernel);
  return error;
}

const char* launch_decode(DecodeArgs args, bool bfloat16, void* workspace, int64_t bytes, int device, void* stream) {
  Kernel kernel{};
  if (const char* error = find(kernel, bfloat16, width_of(args.M), device)) return error;
  const int blocks = blocks_of(args, kernel);
  if (counters_needed(args.N, args.max_rank) > COUNTERS) return "more tiles and ranks than there are counters";
  if (bytes < workspace_bytes(args.M, args.K, args.max_rank, blocks)) return "the workspace is too small";
  bind_workspace(args, workspace, blocks);
  args.stages = kernel.stages;

  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(kernel.threads));
  config.dynamicSmemBytes = size_t(kernel.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  void* parameters[] = {&args};
  LORA_TRY(cudaLaunchKernelExC(&config, kernel.function, parameters));
  return nullptr;
}

}  // namespace lora
