// The tables that the files of this folder make, one an instruction set: under names that do not
// depend on the flags of who sees them.
#pragma once

#include "personalize_runtime.hpp"

namespace personalize::tables {
#if defined(__x86_64__)
extern const kernels::Table *const sse2_table, *const avx2_table, *const avx512_vnni_table;
#if defined(PERSONALIZE_HAS_AVX_VNNI)
extern const kernels::Table* const avx_vnni_table;
#endif
#elif defined(__aarch64__)
extern const kernels::Table *const neon_table, *const neon_dot_table;
#endif
}  // namespace personalize::tables
