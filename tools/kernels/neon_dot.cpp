// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::inline v1::kernels {
const Table* const neon_dot_table = &table_of<NeonDot>;
}  // namespace personalize::inline v1::kernels
