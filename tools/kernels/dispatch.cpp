// Which of the kernels in this library the processor can run, and which one is used.
#include <array>
#include <cstdlib>
#include <string_view>

#include "tables.hpp"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace personalize::tables {

namespace {

using kernels::Scalar;
using kernels::Table;
using kernels::table_of;

struct Available {
  std::array<const Table*, 5> tables{};
  std::size_t count = 0;

  void add(const Table* table) { tables[count++] = table; }

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      add(avx512_vnni_table);
#if defined(PERSONALIZE_HAS_AVX_VNNI)
    // clang 14 knows no name for it: leaf 7, subleaf 1, EAX bit 4.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1U))
      add(avx_vnni_table);
#endif
    if (avx2) add(avx2_table);
    add(sse2_table);
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(neon_dot_table);
#endif
    add(neon_table);
#endif
    add(&table_of<Scalar>);
  }
};

const Available& all() noexcept {
  static const Available tables;
  return tables;
}

}  // namespace
}  // namespace personalize::tables

using personalize::kernels::Table;
using personalize::tables::all;

const Table* const* personalize::kernels::available(std::size_t& count) noexcept {
  count = all().count;
  return all().tables.data();
}

const Table& personalize::kernels::chosen() noexcept {
  static const Table& table = []() -> const Table& {
    if (const char* wanted = std::getenv("PERSONALIZE_KERNELS"))
      for (std::size_t t = 0; t < all().count; ++t)
        if (std::string_view(all().tables[t]->name) == wanted) return *all().tables[t];
    return *all().tables[0];
  }();
  return table;
}
