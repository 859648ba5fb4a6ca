#include "convert/pytorch.hpp"

#include <array>
#include <cstring>
#include <unordered_map>

#include "command/command.hpp"
#include "convert/pickle.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

// Where a storage's bytes lie.
struct StorageBytes {
  std::size_t source;
  std::uint64_t offset;
};

// Names the tensors of nested dictionaries and lists by their path, joined by dots.
class Flattener {
 public:
  using Storages = std::unordered_map<std::string, StorageBytes>;
  Flattener(TensorFile& file, const Storages& storages) : file_(file), storages_(storages) {}

  void add(const std::string& name, const PickleValue& value, int depth) {
    using Kind = PickleValue::Kind;
    if (++visited_ > 1'000'000 || depth > 16)
      throw Failure(file_.name + ": its dictionaries are nested too deeply");
    if (value.kind == Kind::tensor) {
      add_tensor(name, value);
    } else if (value.kind == Kind::dictionary) {
      for (std::size_t i = 0; i + 1 < value.items.size(); i += 2) {
        const PickleValue& key = *value.items[i];
        const std::string part = key.kind == Kind::integer ? std::to_string(key.integer) : key.text;
        add(join(name, part), *value.items[i + 1], depth + 1);
      }
    } else if (value.kind == Kind::list) {
      for (std::size_t i = 0; i < value.items.size(); ++i)
        add(join(name, std::to_string(i)), *value.items[i], depth + 1);
    }
  }

 private:
  static std::string join(const std::string& name, const std::string& part) {
    return name.empty() ? part : name + "." + part;
  }

  void add_tensor(const std::string& name, const PickleValue& value) {
    const PickleValue& storage = *value.items[0];
    const auto found = storages_.find(storage.text);
    if (found == storages_.end())
      throw Failure(file_.name + ": tensor '" + name + "' has no storage in the file");
    const std::uint64_t size = element_bytes(value.dtype) * (value.complex ? 2 : 1);
    Tensor tensor;
    tensor.name = name.empty() ? "tensor" : name;
    tensor.dtype = value.dtype;
    tensor.type_name = value.type_name;
    tensor.shape = value.shape;
    tensor.strides = value.strides;
    tensor.source = found->second.source;
    const auto offset = detail::checked_product(static_cast<std::uint64_t>(value.integer), size);
    if (!offset || *offset > std::numeric_limits<std::uint64_t>::max() - found->second.offset)
      throw Failure(file_.name + ": tensor '" + name + "' lies outside its storage");
    tensor.offset = found->second.offset + *offset;
    if (value.complex) {
      for (std::uint64_t& stride : tensor.strides) {
        const auto doubled = detail::checked_product(stride, 2);
        if (!doubled) throw Failure(file_.name + ": tensor '" + name + "': its strides overflow");
        stride = *doubled;
      }
      tensor.strides.push_back(1);
      tensor.shape.push_back(2);
    }
    file_.add(std::move(tensor));
  }

  TensorFile& file_;
  const Storages& storages_;
  std::size_t visited_ = 0;
};

constexpr std::string_view magic_number{"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 10};
const std::string state_dictionary = "save model.state_dict() with torch.save";

}  // namespace

TensorFile open_pytorch(const std::shared_ptr<ZipArchive>& archive,
                        const ZipArchive::Entry& pickle) {
  TensorFile file;
  file.name = archive->name();
  file.format = "pytorch";
  const std::string root = pickle.name.substr(0, pickle.name.size() - std::strlen("data.pkl"));
  if (const auto* order = archive->find(root + "byteorder")) {
    std::string text(static_cast<std::size_t>(std::min<std::uint64_t>(order->size, 16)), '\0');
    archive->source(*order)->read(0, std::as_writable_bytes(std::span(text)));
    if (text != "little") throw Failure(file.name + ": is big-endian; save it on another machine");
  }
  Flattener::Storages storages;
  const std::string folder = root + "data/";
  for (const ZipArchive::Entry& entry : archive->entries())
    if (entry.name.starts_with(folder)) {
      storages[entry.name.substr(folder.size())] = {file.sources.size(), 0};
      file.sources.push_back(archive->source(entry));
    }
  const auto source = archive->source(pickle);
  if (archive->find(root + "constants.pkl"))
    throw Failure(file.name +
                  ": is a TorchScript archive, whose program is not read; save "
                  "torch.jit.load(path).state_dict() with torch.save, or export the model as ONNX");
  Unpickler unpickler(*source, 0, file.name, state_dictionary);
  Flattener(file, storages).add("", unpickler.load(), 0);
  return file;
}

TensorFile open_legacy_pytorch(const Input& input) {
  // Pickles of a magic number, the protocol, the system, the object and the list of storage keys;
  // then of each storage its number of elements and its bytes.
  TensorFile file;
  file.name = input.name;
  file.format = "pytorch";
  file.sources.push_back(input.open());
  ByteSource& source = *file.sources[0];
  // Pickled without torch.save: what it holds is of any library.
  std::string head(static_cast<std::size_t>(std::min<std::uint64_t>(source.size(), 32)), '\0');
  source.read(0, std::as_writable_bytes(std::span(head)));
  const bool of_torch =
      head.find(magic_number) != std::string::npos || head.starts_with("L1195470371460388013333");
  const std::string matrices =
      "save its matrices by numpy.savez(path, user_factors=..., item_factors=...)";
  Unpickler unpickler(source, 0, file.name, of_torch ? state_dictionary : matrices);
  unpickler.load();
  if (!of_torch)
    throw Failure(file.name + ": a pickle, but not a file of torch.save; " + state_dictionary +
                  ", or " + matrices);
  if (unpickler.load().integer != 1001)
    throw Failure(file.name + ": unknown protocol of PyTorch's older format");
  unpickler.load();
  const PickleValue& object = unpickler.load();
  const PickleValue& keys = unpickler.load();
  std::unordered_map<std::string, const PickleValue*> declared;
  for (const PickleValue& value : unpickler.values())
    if (value.kind == PickleValue::Kind::storage) declared[value.text] = &value;
  Flattener::Storages storages;
  std::uint64_t at = unpickler.offset();
  for (const PickleValue* key : keys.items) {
    const auto found = declared.find(key->text);
    if (found == declared.end())
      throw Failure(file.name + ": storage '" + key->text.substr(0, 40) + "' is not declared");
    if (found->second->dtype == DType::foreign)
      throw Failure(file.name + ": a tensor is in a " + found->second->type_name +
                    ", which is not read; save it as torch.float32");
    std::uint64_t elements;
    std::array<std::byte, 8> count;
    source.read(at, count);
    std::memcpy(&elements, count.data(), 8);
    if (elements != static_cast<std::uint64_t>(found->second->integer))
      throw Failure(file.name + ": a storage has another size than declared");
    const auto size = detail::checked_product(
        elements, element_bytes(found->second->dtype) * (found->second->complex ? 2 : 1));
    if (!size || at + 8 > source.size() || *size > source.size() - at - 8)
      throw Failure(file.name + ": ends before what it declares; copy it again");
    storages[key->text] = {0, at + 8};
    at += 8 + *size;
  }
  Flattener(file, storages).add("", object, 0);
  return file;
}

}  // namespace personalize::tools
