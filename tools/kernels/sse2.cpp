// The kernels of one instruction set; only what bears its tag may be compiled here.
#include "tables.hpp"

namespace personalize {
inline namespace v1 {
namespace kernels {
const Table* const sse2_table = &table_of<Sse2>;
}  // namespace kernels
}  // namespace v1
}  // namespace personalize
