// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::tables {
const kernels::Table* const avx512_vnni_table = &kernels::table_of<kernels::Avx512Vnni>;
}  // namespace personalize::tables
