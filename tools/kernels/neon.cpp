// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::tables {
const kernels::Table* const neon_table = &kernels::table_of<kernels::Neon>;
}  // namespace personalize::tables
