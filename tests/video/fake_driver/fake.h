// What the two fake driver libraries share, and what tests set and look at (through ctypes).
#pragma once

#include <ffnvcodec/dynlink_cuda.h>

extern "C" {
// Settings and counts live in one table of numbers by name; names that nobody set are 0.
void fake_set(const char* name, long value);
long fake_get(const char* name);
void fake_add(const char* name, long value);
// Back to nothing set and nothing counted.
void fake_reset();

// Counts the call; the error that "fail:<call>" asks for, from its call number "skip:<call>" on, else CUDA_SUCCESS.
CUresult fake_call(const char* call);
// The same, and CUDA_ERROR_INVALID_CONTEXT (201) unless the calling thread has a context.
CUresult fake_call_in_context(const char* call);
}
