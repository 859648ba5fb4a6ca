// The tables that the files of this folder make, one an instruction set.
#pragma once

#include "personalize_runtime.hpp"

namespace personalize {
inline namespace v1 {
namespace kernels {
#if defined(__x86_64__)
extern const Table *const sse2_table, *const avx2_table, *const avx512_vnni_table;
#if defined(PERSONALIZE_HAS_AVX_VNNI)
extern const Table* const avx_vnni_table;
#endif
#elif defined(__aarch64__)
extern const Table *const neon_table, *const neon_dot_table;
#endif
}  // namespace kernels
}  // namespace v1
}  // namespace personalize
