/* A CUDA runtime of one pretended H100: it answers what torch asks before the first kernel, and has no memory to give. */
#include <stdlib.h>
#include <string.h>
#define __DRIVER_TYPES_ONLY__
#define __align__(n)
#define __builtin_align__(n)
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define CUDARTAPI
#define __host__
#include <limits.h>
#include "driver_types.h"

#define CALL(name, ...) int name(__VA_ARGS__)
#define FINE(name, ...) CALL(name, __VA_ARGS__) { return 0; }
#define GIVE(name, pointer, value, ...) CALL(name, __VA_ARGS__) { *pointer = value; return 0; }
#define HANDLE(name, ...) CALL(name, void **made, ##__VA_ARGS__) { *made = malloc(8); return 0; }
#define CUDA_VERSION 13000
#define NO_MEMORY 2

GIVE(cudaGetDeviceCount, n, 1, int *n)
GIVE(cudaGetDevice, n, 0, int *n)
GIVE(cudaDriverGetVersion, n, CUDA_VERSION, int *n)
GIVE(cudaRuntimeGetVersion, n, CUDA_VERSION, int *n)
GIVE(cudaDeviceCanAccessPeer, yes, 0, int *yes, int device, int peer)
GIVE(cudaStreamIsCapturing, status, 0, void *stream, int *status)
GIVE(cudaStreamGetCaptureInfo, status, 0, void *stream, int *status, void *a, void *b, void *c, void *d, void *e)
GIVE(cudaEventElapsedTime, ms, 1, float *ms, void *start, void *end)
FINE(cudaSetDevice, int device)
FINE(cudaDeviceSynchronize, void)
FINE(cudaStreamDestroy, void *stream)
FINE(cudaStreamQuery, void *stream)
FINE(cudaStreamSynchronize, void *stream)
FINE(cudaStreamWaitEvent, void *stream, void *event, unsigned flags)
FINE(cudaEventDestroy, void *event)
FINE(cudaEventQuery, void *event)
FINE(cudaEventRecord, void *event, void *stream)
FINE(cudaEventSynchronize, void *event)
FINE(cudaThreadExchangeStreamCaptureMode, int *mode)
FINE(cudaGetLastError, void)
FINE(cudaPeekAtLastError, void)
FINE(cuInit, unsigned flags)
HANDLE(cudaEventCreate)
HANDLE(cudaEventCreateWithFlags, unsigned flags)
HANDLE(cudaStreamCreateWithPriority, unsigned flags, int priority)

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 80UL << 30; return 0; }
/* Whoever asks for memory has left the rehearsal. */
int cudaMalloc(void **memory, size_t size) { *memory = NULL; return NO_MEMORY; }
int cudaPointerGetAttributes(void *attributes, void *pointer) { memset(attributes, 0, 32); return 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return 0;
}

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long flags, int *status) {
    *function = NULL;
    if (status) *status = 1;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    memset(card, 0, sizeof *card);
    strcpy(card->name, "NVIDIA H100 80GB HBM3");
    card->major = 9;
    card->multiProcessorCount = 132;
    card->totalGlobalMem = 85045870592UL;
    card->l2CacheSize = 50 << 20;
    card->warpSize = 32;
    card->maxThreadsPerBlock = card->maxThreadsDim[0] = card->maxThreadsDim[1] = 1024;
    card->maxThreadsDim[2] = 64;
    card->maxThreadsPerMultiProcessor = 2048;
    card->regsPerBlock = card->regsPerMultiprocessor = 65536;
    card->sharedMemPerBlock = 48 << 10;
    card->sharedMemPerBlockOptin = 227 << 10;
    card->sharedMemPerMultiprocessor = 228 << 10;
    card->maxGridSize[0] = INT_MAX;
    card->maxGridSize[1] = card->maxGridSize[2] = 65535;
    card->textureAlignment = 512;
    card->unifiedAddressing = card->managedMemory = 1;
    return 0;
}
