// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::inline v1::kernels {
const Table* const sse2_table = &table_of<Sse2>;
}  // namespace personalize::inline v1::kernels
