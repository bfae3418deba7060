// parallel_for: torch's thread pool where torch offers it, otherwise our own.
#pragma once
#include <cstdint>

namespace fusionsum {

// Calls body(i, context) once for each 0 <= i < count, in any order, on any thread, and returns when all are done.
// Bodies must not throw. Called from within a body, it runs serially.
void parallel_for(int64_t count, void (*body)(int64_t, void*), void* context);

// The addresses of libtorch's torch_parallel_for and torch_get_num_threads (exported since 2.10), or null for our own
// pool.
void use_torch_pool(void* torch_parallel_for, void* torch_get_num_threads);
bool uses_torch_pool();

void set_num_threads(int count);
int get_num_threads();

}  // namespace fusionsum
