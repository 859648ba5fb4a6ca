// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize::inline v1::kernels {
const Table* const avx_vnni_table = &table_of<AvxVnni>;
}  // namespace personalize::inline v1::kernels
