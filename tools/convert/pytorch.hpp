// PyTorch's .pt: a pickle of the object, and the tensors' storages beside it.
#pragma once

#include <memory>

#include "convert/zip.hpp"

namespace personalize::tools {

// pickle: the entry data.pkl of the archive. Throws Failure.
TensorFile open_pytorch(const std::shared_ptr<ZipArchive>& archive,
                        const ZipArchive::Entry& pickle);

}  // namespace personalize::tools
