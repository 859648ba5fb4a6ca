// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::inline v1::kernels {
const Table* const avx512_vnni_table = &table_of<Avx512Vnni>;
}  // namespace personalize::inline v1::kernels
