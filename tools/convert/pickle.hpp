// A restricted unpickler: knows what PyTorch state dictionaries are made of (tensors, dictionaries,
// lists, plain values) and refuses everything else. It calls nothing that a pickle names.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "convert/tensors.hpp"

namespace personalize::tools {

struct PickleValue {
  enum class Kind : std::uint8_t {
    none,
    boolean,
    integer,
    real,
    text,
    list,        // and tuples and sets: items
    dictionary,  // items: key, value, key, value, ...
    name,        // text: module.name of an allowed global
    storage,     // text: its key; dtype, integer: its number of elements, or bytes if dtype is u8
    plain,       // an object of a class of plain data, which is not looked into
    tensor,      // items: its storage; dtype; integer: offset, shape and strides in elements
  };
  Kind kind = Kind::none;
  DType dtype = DType::foreign;
  bool complex = false;
  std::int64_t integer = 0;
  double real = 0;
  std::string text;
  std::string type_name;  // storage, tensor: of a dtype that is foreign
  std::vector<const PickleValue*> items;
  std::vector<std::uint64_t> shape, strides;
};

class Unpickler {
 public:
  // Reads from `source` on; `name` stands in messages, and `cure`: how to save what is refused.
  Unpickler(ByteSource& source, std::uint64_t offset, std::string name, std::string cure);

  // The next pickle of the stream. The value lives as long as the unpickler. Throws Failure: a
  // malformed pickle, or one that calls or builds anything but tensors and plain values.
  const PickleValue& load();
  std::uint64_t offset() const { return begin_ + at_; }  // behind the last pickle
  const std::deque<PickleValue>& values() const { return values_; }

 private:
  using Kind = PickleValue::Kind;
  PickleValue* make(Kind kind);
  PickleValue* make_text(std::string text);
  void push(PickleValue* value);
  PickleValue* pop();
  PickleValue* top();
  std::vector<PickleValue*> pop_to_mark();
  void set_items(PickleValue* target, const std::vector<PickleValue*>& values);
  PickleValue* global(const std::string& module, const std::string& name);
  PickleValue* reduce(const PickleValue& callable, const PickleValue& arguments);
  PickleValue* rebuild_tensor(const PickleValue& arguments);
  PickleValue* storage(const PickleValue& id);
  PickleValue* storage_in_line();
  PickleValue* integer_in_line(bool may_be_boolean);
  std::string escaped_line();

  std::uint8_t byte();
  std::string bytes(std::uint64_t count);
  template <class T>
  T integer();
  std::string line();
  PickleValue* memo(std::uint64_t index) const;
  void remember(std::uint64_t index);
  void spend(std::size_t references);
  [[noreturn]] void refuse(const std::string& what) const;

  ByteSource& source_;
  std::uint64_t begin_, at_ = 0;
  std::vector<std::byte> buffer_;
  std::string name_, cure_;
  std::deque<PickleValue> values_;
  std::vector<PickleValue*> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, PickleValue*> memo_;
  std::uint64_t text_bytes_ = 0;
  std::size_t references_ = 0;
};

}  // namespace personalize::tools
