// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::tables {
const kernels::Table* const sse2_table = &kernels::table_of<kernels::Sse2>;
}  // namespace personalize::tables
