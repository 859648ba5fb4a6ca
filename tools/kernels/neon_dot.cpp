// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize {
inline namespace v1 {
namespace kernels {
const Table* const neon_dot_table = &table_of<NeonDot>;
}  // namespace kernels
}  // namespace v1
}  // namespace personalize
