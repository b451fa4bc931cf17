// A CUDA runtime without a GPU: loaded before the real one, it answers in its place.
//
// The CUDA build of torch, its operators and its caching allocator run unchanged on top. Device memory is address space
// that is counted and never touched; kernels, copies between device addresses and library calls do nothing; what is
// copied from the device is zeros. So every allocation is the real program's, and no value means anything.
//
// EMULATED_MEMORY (bytes), EMULATED_SMS and EMULATED_CAPABILITY (10 * major + minor) say what device it is; without
// them it has an H100's. It stands for libcuda.so.1, whose name it carries, for libcudart and for libcublas(Lt).

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define MIB ((size_t)1 << 20)
#define ROUNDED(number, step) (((number) + (step) - 1) / (step) * (step))

// ---- what device it is ----------------------------------------------------------------------------------------------

static size_t number(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

static size_t total_memory(void) { return number("EMULATED_MEMORY", 80995 * MIB); }
static int capability(void) { return (int)number("EMULATED_CAPABILITY", 90); }

static int attribute(enum cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: return (int)number("EMULATED_SMS", 132);
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return (int)number("EMULATED_THREADS", 2048);
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
  }
}

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "emulated");
  p->totalGlobalMem = total_memory();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX);
  p->maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY);
  p->maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
  p->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = p->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->cooperativeLaunch = p->concurrentKernels = p->unifiedAddressing = p->memoryPoolsSupported = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->textureAlignment = 512;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  strncpy(text, "0000:00:00.0", length);
  return cudaSuccess;
}

// ---- memory: counted, never touched ---------------------------------------------------------------------------------

enum { MAX_SEGMENTS = 1 << 16 };
static const uintptr_t FIRST = (uintptr_t)3 << 44, LAST = (uintptr_t)5 << 44;
static const size_t PAGE = 2 * MIB;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { uintptr_t address; size_t bytes; } segments[MAX_SEGMENTS];
static int num_segments;
static uintptr_t next_address = FIRST;
static size_t used_memory;
static __thread cudaError_t last_error;

static int on_device(const void *pointer) { return (uintptr_t)pointer >= FIRST && (uintptr_t)pointer < LAST; }

// Count bytes as used; 0 if the device does not have them.
static int take(size_t bytes) {
  if (used_memory + bytes > total_memory()) return 0;
  used_memory += bytes;
  return 1;
}

static uintptr_t take_addresses(size_t bytes) {
  uintptr_t address = next_address;
  next_address += ROUNDED(bytes, PAGE);
  if (next_address > LAST) abort();
  return address;
}

API cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  pthread_mutex_lock(&lock);
  bytes = ROUNDED(bytes, PAGE);
  int fits = num_segments < MAX_SEGMENTS && take(bytes);
  *pointer = fits ? (void *)take_addresses(bytes) : NULL;
  if (fits) {
    segments[num_segments].address = (uintptr_t)*pointer;
    segments[num_segments++].bytes = bytes;
  }
  pthread_mutex_unlock(&lock);
  return fits ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}

API cudaError_t cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_segments; i++) {
    if (segments[i].address == (uintptr_t)pointer) {
      used_memory -= segments[i].bytes;
      segments[i] = segments[--num_segments];
      break;
    }
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = total_memory();
  *unused = *total - used_memory;
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  *pointer = aligned_alloc(4096, ROUNDED(bytes, (size_t)4096));
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  if (!on_device(to)) on_device(from) ? memset(to, 0, bytes) : memcpy(to, from, bytes);
  return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
  return cudaMemcpy(to, from, bytes, kind);
}

API cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = (void *)FIRST; return cudaSuccess; }

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  *(on_device(pointer) ? &found->devicePointer : &found->hostPointer) = (void *)pointer;
  return cudaSuccess;
}

// Expandable segments: addresses first, memory for them later. A handle is the number of its bytes.

API int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) { *bytes = PAGE; return 0; }

API int cuMemAddressReserve(uintptr_t *address, size_t bytes, size_t alignment, uintptr_t wish, uint64_t flags) {
  pthread_mutex_lock(&lock);
  *address = take_addresses(bytes);
  pthread_mutex_unlock(&lock);
  return 0;
}

API int cuMemCreate(uint64_t *handle, size_t bytes, const void *properties, uint64_t flags) {
  pthread_mutex_lock(&lock);
  int fits = take(bytes);
  pthread_mutex_unlock(&lock);
  *handle = bytes;
  return fits ? 0 : cudaErrorMemoryAllocation;
}

API int cuMemRelease(uint64_t handle) {
  pthread_mutex_lock(&lock);
  used_memory -= handle;
  pthread_mutex_unlock(&lock);
  return 0;
}

// ---- streams, events, kernels: nothing to wait for ------------------------------------------------------------------

static void *handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

API cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); return cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned f) { *stream = handle(); return cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned f, int p) { *stream = handle(); return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned f) { *event = handle(); return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1e-3f; return cudaSuccess; }

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = capability();
  found->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                       size_t shared, unsigned flags) {
  int most = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  *blocks = threads > 0 && threads <= most ? most / threads : 1;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                              size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}

API cudaError_t __cudaGetKernel(void *kernel, const void *function) { *(const void **)kernel = function; return cudaSuccess; }
API cudaError_t cudaPeekAtLastError(void) { return last_error; }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// ---- the driver: looked up by name ----------------------------------------------------------------------------------

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

API int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? 0 : 1;
  return *function ? 0 : cudaErrorSymbolNotFound;
}

API int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
API int cuDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
API int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)16; return 0; }
API int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
API int cuGetErrorString(int error, const char **text) { *text = "emulated"; return 0; }

// ---- cuBLAS: handles, and one algorithm without a workspace of its own ----------------------------------------------

struct heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };

API int cublasCreate_v2(void **made) { *made = handle(); return 0; }
API int cublasGetMathMode(void *blas, int *mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void *blas, int *mode) { *mode = 0; return 0; }
API int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = handle(); return 0; }
API int cublasLtMatmulPreferenceCreate(void **made) { *made = handle(); return 0; }
API int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *made = handle();
  return 0;
}
API size_t cublasLtGetVersion(void) { return 130100; }

API int cublasLtMatmulAlgoGetHeuristic(void *blas, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                       int wanted, struct heuristic *found, int *count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return 0;
}

// ---- what does nothing at all, and succeeds -------------------------------------------------------------------------

API __attribute__((used)) int nothing(void) { return 0; }

// Other names of `nothing`; declared nowhere here, so that the headers' declarations of them do not matter.
#define NOTHING(...) \
  __asm__(".irp name, " #__VA_ARGS__ "\n .globl \\name\n .type \\name, @function\n .set \\name, nothing\n .endr")

NOTHING(
  cudaSetDevice, cudaDeviceSynchronize, cudaDeviceEnablePeerAccess, cudaMemset, cudaMemsetAsync, cudaMemcpyPeerAsync,
  cudaMemcpyToSymbol, cudaHostRegister, cudaHostUnregister, cudaThreadExchangeStreamCaptureMode, cudaStreamDestroy,
  cudaStreamQuery, cudaStreamSynchronize, cudaStreamWaitEvent, cudaStreamAddCallback, cudaLaunchHostFunc,
  cudaProfilerStart, cudaProfilerStop, cudaEventDestroy, cudaEventQuery, cudaEventRecord, cudaEventRecordWithFlags,
  cudaEventSynchronize, cudaFuncSetAttribute, cudaLaunchKernel, __cudaLaunchKernel, cudaLaunchKernelExC,
  cudaLaunchCooperativeKernel);

NOTHING(
  cuInit, cuCtxSetCurrent, cuCtxSynchronize, cuStreamSynchronize, cuMemAddressFree, cuMemMap, cuMemUnmap,
  cuMemSetAccess, cuMemGetAccess, cuMemRetainAllocationHandle, cuMemGetAllocationPropertiesFromHandle,
  cuMemExportToShareableHandle, cuMemImportFromShareableHandle, cuMemsetD32Async, cuPointerGetAttribute,
  cuTensorMapEncodeTiled, cuModuleLoad, cuModuleLoadData, cuModuleLoadDataEx, cuModuleUnload, cuModuleGetFunction,
  cuLaunchKernel, cuLaunchCooperativeKernel, cuFuncGetAttribute, cuFuncSetAttribute, cuFuncSetCacheConfig,
  cuLinkCreate_v2, cuLinkAddData_v2, cuLinkComplete, cuStreamWriteValue32, cuStreamWriteValue32_v2,
  cuStreamWaitValue32_v2, cuOccupancyMaxActiveBlocksPerMultiprocessor, cuMulticastCreate, cuMulticastAddDevice,
  cuMulticastBindMem, cuMulticastBindAddr, cuMulticastUnbind, cuMulticastGetGranularity, cuGreenCtxCreate,
  cuGreenCtxDestroy, cuGreenCtxStreamCreate, cuCtxFromGreenCtx, cuDeviceGetDevResource, cuDevResourceGenerateDesc,
  cuDevSmResourceSplitByCount);

NOTHING(
  cublasDestroy_v2, cublasSetMathMode, cublasSetPointerMode_v2, cublasSetStream_v2, cublasSetWorkspace_v2,
  cublasGemmEx, cublasGemmStridedBatchedEx, cublasDotEx, cublasSgemm_v2, cublasSgemmEx, cublasSgemmStridedBatched,
  cublasSgemv_v2, cublasSdot_v2, cublasDgemm_v2, cublasDgemmStridedBatched, cublasDgemv_v2, cublasDdot_v2,
  cublasLtMatmul, cublasLtMatmulDescDestroy, cublasLtMatmulDescSetAttribute, cublasLtMatmulPreferenceDestroy,
  cublasLtMatmulPreferenceSetAttribute, cublasLtMatrixLayoutDestroy, cublasLtMatrixLayoutSetAttribute);
