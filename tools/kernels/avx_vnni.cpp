// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize {
inline namespace v1 {
namespace kernels {
const Table* const avx_vnni_table = &table_of<AvxVnni>;
}  // namespace kernels
}  // namespace v1
}  // namespace personalize
