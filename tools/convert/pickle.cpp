#include "convert/pickle.hpp"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <optional>
#include <regex>
#include <set>
#include <utility>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

constexpr std::size_t max_values = 1'000'000;
constexpr std::size_t max_references = 4 * max_values;  // from lists and dictionaries to values

// Python's pickle opcodes, protocols 0 to 5 (CPython, Lib/pickletools.py).
enum Opcode : std::uint8_t {
  op_mark = '(',
  op_stop = '.',
  op_pop = '0',
  op_pop_mark = '1',
  op_dup = '2',
  op_float = 'F',
  op_int = 'I',
  op_binint = 'J',
  op_binint1 = 'K',
  op_long = 'L',
  op_binint2 = 'M',
  op_none = 'N',
  op_persid = 'P',
  op_binpersid = 'Q',
  op_reduce = 'R',
  op_string = 'S',
  op_binstring = 'T',
  op_short_binstring = 'U',
  op_unicode = 'V',
  op_binunicode = 'X',
  op_append = 'a',
  op_build = 'b',
  op_global = 'c',
  op_dict = 'd',
  op_appends = 'e',
  op_get = 'g',
  op_binget = 'h',
  op_long_binget = 'j',
  op_list = 'l',
  op_put = 'p',
  op_binput = 'q',
  op_long_binput = 'r',
  op_setitem = 's',
  op_tuple = 't',
  op_empty_tuple = ')',
  op_setitems = 'u',
  op_binfloat = 'G',
  op_empty_list = ']',
  op_empty_dict = '}',
  op_binbytes = 'B',
  op_short_binbytes = 'C',
  op_proto = 0x80,
  op_newobj = 0x81,
  op_tuple1 = 0x85,
  op_tuple2 = 0x86,
  op_tuple3 = 0x87,
  op_newtrue = 0x88,
  op_newfalse = 0x89,
  op_long1 = 0x8a,
  op_long4 = 0x8b,
  op_short_binunicode = 0x8c,
  op_binunicode8 = 0x8d,
  op_binbytes8 = 0x8e,
  op_empty_set = 0x8f,
  op_additems = 0x90,
  op_stack_global = 0x93,
  op_memoize = 0x94,
  op_frame = 0x95,
};

struct TorchType {
  std::string_view name;  // behind "torch."
  DType dtype;
  bool complex = false;
};
constexpr TorchType storage_types[] = {{"DoubleStorage", DType::f64},
                                       {"FloatStorage", DType::f32},
                                       {"HalfStorage", DType::f16},
                                       {"BFloat16Storage", DType::bf16},
                                       {"LongStorage", DType::i64},
                                       {"IntStorage", DType::i32},
                                       {"ShortStorage", DType::i16},
                                       {"CharStorage", DType::i8},
                                       {"ByteStorage", DType::u8},
                                       {"BoolStorage", DType::u8},
                                       {"ComplexFloatStorage", DType::f32, true},
                                       {"ComplexDoubleStorage", DType::foreign},
                                       {"QInt8Storage", DType::foreign},
                                       {"QUInt8Storage", DType::foreign},
                                       {"QInt32Storage", DType::foreign},
                                       {"storage.UntypedStorage", DType::u8},
                                       {"UntypedStorage", DType::u8}};
constexpr TorchType element_types[] = {{"float64", DType::f64},
                                       {"float32", DType::f32},
                                       {"float16", DType::f16},
                                       {"bfloat16", DType::bf16},
                                       {"complex64", DType::f32, true},
                                       {"int64", DType::i64},
                                       {"int32", DType::i32},
                                       {"int16", DType::i16},
                                       {"int8", DType::i8},
                                       {"uint64", DType::u64},
                                       {"uint32", DType::u32},
                                       {"uint16", DType::u16},
                                       {"uint8", DType::u8},
                                       {"bool", DType::u8},
                                       {"complex128", DType::foreign},
                                       {"complex32", DType::foreign},
                                       {"float8_e4m3fn", DType::foreign},
                                       {"float8_e4m3fnuz", DType::foreign},
                                       {"float8_e5m2", DType::foreign},
                                       {"float8_e5m2fnuz", DType::foreign},
                                       {"float8_e8m0fnu", DType::foreign},
                                       {"float4_e2m1fn_x2", DType::foreign}};

template <std::size_t size>
const TorchType* find_type(const TorchType (&types)[size], std::string_view global) {
  if (!global.starts_with("torch.")) return nullptr;
  const auto* found = std::find_if(std::begin(types), std::end(types), [&](const TorchType& type) {
    return type.name == global.substr(6);
  });
  return found == std::end(types) ? nullptr : found;
}

// Classes of plain data that checkpoints keep beside the model: options, paths, numbers of NumPy's.
// Nothing is made of them, so that nothing they do can matter.
bool is_plain(std::string_view name) {
  static const std::set<std::string_view> names{"argparse.Namespace",
                                                "types.SimpleNamespace",
                                                "copyreg._reconstructor",
                                                "copy_reg._reconstructor",
                                                "builtins.object",
                                                "__builtin__.object",
                                                "pathlib.PosixPath",
                                                "pathlib.WindowsPath",
                                                "pathlib.PurePosixPath",
                                                "pathlib.PureWindowsPath",
                                                "pathlib._local.PosixPath",
                                                "pathlib._local.WindowsPath",
                                                "datetime.datetime",
                                                "datetime.timedelta",
                                                "_codecs.encode",
                                                "numpy.dtype",
                                                "numpy.core.multiarray.scalar",
                                                "numpy._core.multiarray.scalar",
                                                "torch.device",
                                                "builtins.complex",
                                                "__builtin__.complex"};
  return names.count(name) > 0;
}
bool is_dictionary(std::string_view name) {
  return name == "collections.defaultdict" || name == "collections.Counter";
}
bool is_collection(std::string_view name) {
  static const std::set<std::string_view> names{
      "builtins.set",  "__builtin__.set",  "builtins.frozenset", "__builtin__.frozenset",
      "builtins.list", "__builtin__.list", "collections.deque"};
  return names.count(name) > 0;
}

bool known_global(std::string_view name) {
  static const std::set<std::string_view> others{"collections.OrderedDict",
                                                 "torch._utils._rebuild_tensor_v2",
                                                 "torch._utils._rebuild_tensor_v3",
                                                 "torch._utils._rebuild_tensor",
                                                 "torch._utils._rebuild_parameter",
                                                 "torch._utils._rebuild_parameter_with_state",
                                                 "torch.Size"};
  return others.count(name) > 0 || is_plain(name) || is_dictionary(name) || is_collection(name) ||
         find_type(storage_types, name) || find_type(element_types, name);
}

// What a global that is no part of a state dictionary of dense numbers stands for.
std::string_view hint(std::string_view name) {
  if (name.starts_with("__torch__."))
    return " (a TorchScript archive; save torch.jit.load(path).state_dict() with torch.save)";
  if (name.starts_with("numpy.")) return " (a value of NumPy's)";
  if (name.starts_with("sklearn.")) return " (a model of scikit-learn's)";
  if (name.starts_with("joblib.")) return " (a file of joblib's)";
  return "";
}

void append_utf8(std::string& text, std::uint32_t code) {
  const auto add = [&](std::uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    add(code);
  } else if (code < 0x800) {
    add(0xc0 | code >> 6);
    add(0x80 | (code & 63));
  } else if (code < 0x10000) {
    add(0xe0 | code >> 12);
    add(0x80 | (code >> 6 & 63));
    add(0x80 | (code & 63));
  } else {
    add(0xf0 | (code >> 18 & 7));
    add(0x80 | (code >> 12 & 63));
    add(0x80 | (code >> 6 & 63));
    add(0x80 | (code & 63));
  }
}

}  // namespace

Unpickler::Unpickler(ByteSource& source, std::uint64_t offset, std::string name, std::string cure)
    : source_(source), begin_(offset), name_(std::move(name)), cure_(std::move(cure)) {}

void Unpickler::refuse(const std::string& what) const {
  throw Failure(name_ + ": pickle, byte " + std::to_string(begin_ + at_) + ": " + what);
}

std::uint8_t Unpickler::byte() {
  if (at_ == buffer_.size()) {
    if (at_ >= max_structure_bytes) refuse("is too long");
    const std::uint64_t left = source_.size() - std::min(source_.size(), begin_ + at_);
    if (left == 0) refuse("ends too early; copy the file again");
    const auto more = static_cast<std::size_t>(std::min<std::uint64_t>(left, 1 << 16));
    buffer_.resize(buffer_.size() + more);
    source_.read(begin_ + at_, std::span(buffer_).last(more));
  }
  return static_cast<std::uint8_t>(buffer_[at_++]);
}

std::string Unpickler::bytes(std::uint64_t count) {
  text_bytes_ += std::min<std::uint64_t>(count, max_structure_bytes);
  if (count > max_structure_bytes || text_bytes_ > max_structure_bytes) refuse("is too long");
  std::string text;
  for (std::uint64_t i = 0; i < count; ++i) text.push_back(static_cast<char>(byte()));
  return text;
}

template <class T>
T Unpickler::integer() {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    value = static_cast<T>(value | static_cast<T>(static_cast<T>(byte()) << (8 * i)));
  return value;
}

std::string Unpickler::line() {
  std::string text;
  for (;;) {
    const std::uint8_t c = byte();
    if (c == '\n') return text;
    if (text.size() == 4096) refuse("a line is too long");
    text.push_back(static_cast<char>(c));
  }
}

// A few bytes of a pickle can copy a list, again and again.
void Unpickler::spend(std::size_t references) {
  references_ += references;
  if (references_ > max_references) refuse("holds too many values");
}

PickleValue* Unpickler::make(Kind kind) {
  if (values_.size() == max_values)
    refuse("has more than " + std::to_string(max_values) + " values");
  values_.emplace_back().kind = kind;
  return &values_.back();
}

PickleValue* Unpickler::make_text(std::string text) {
  PickleValue* value = make(Kind::text);
  value->text = std::move(text);
  return value;
}

void Unpickler::push(PickleValue* value) {
  if (stack_.size() == max_values) refuse("is nested too deeply");
  stack_.push_back(value);
}

PickleValue* Unpickler::top() {
  if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) refuse("takes from an empty stack");
  return stack_.back();
}

PickleValue* Unpickler::pop() {
  PickleValue* value = top();
  stack_.pop_back();
  return value;
}

std::vector<PickleValue*> Unpickler::pop_to_mark() {
  if (marks_.empty()) refuse("has no mark to go back to");
  const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
  std::vector<PickleValue*> values(begin, stack_.end());
  stack_.erase(begin, stack_.end());
  marks_.pop_back();
  spend(values.size());
  return values;
}

PickleValue* Unpickler::memo(std::uint64_t index) const {
  const auto found = memo_.find(index);
  if (found == memo_.end()) refuse("refers to a value that it does not have");
  return found->second;
}

void Unpickler::remember(std::uint64_t index) {
  memo_[index] = top();
  if (memo_.size() > max_values) refuse("remembers too many values");
}

void Unpickler::set_items(PickleValue* target, const std::vector<PickleValue*>& values) {
  if (target->kind != Kind::dictionary || values.size() % 2 != 0)
    refuse("sets items of what is no dictionary");
  target->items.insert(target->items.end(), values.begin(), values.end());
}

PickleValue* Unpickler::global(const std::string& module, const std::string& global_name) {
  const std::string full = module + "." + global_name;
  if (full.starts_with("torch._utils._rebuild_sparse"))
    refuse("holds a sparse tensor, which is not read; save it as .to_dense()");
  if (full == "torch._utils._rebuild_qtensor")
    refuse("holds a quantised tensor, which is not read; save it as .dequantize()");
  if (!known_global(full)) {
    std::string shown = full.substr(0, 80);
    for (char& c : shown)
      if (c < 32 || c > 126) c = '?';
    refuse(
        "names " + shown + std::string(hint(full)) +
        ", which could run code; only tensors, dictionaries and plain values are read: " + cure_);
  }
  PickleValue* value = make(Kind::name);
  value->text = full;
  return value;
}

PickleValue* Unpickler::storage(const PickleValue& id) {
  // ('storage', type, key, location, elements), older: and a view of another storage.
  if (id.kind != Kind::list || id.items.size() < 5 || id.items[0]->text != "storage" ||
      id.items[1]->kind != Kind::name || id.items[2]->kind != Kind::text ||
      id.items[4]->kind != Kind::integer || id.items[4]->integer < 0)
    refuse("refers to something that is no tensor storage");
  if (id.items.size() > 5 && id.items[5]->kind != Kind::none)
    refuse("has a storage that is a view of another; save it with a newer PyTorch");
  const TorchType* type = find_type(storage_types, id.items[1]->text);
  if (!type) refuse("has a storage of unknown type " + id.items[1]->text);
  PickleValue* value = make(Kind::storage);
  value->text = id.items[2]->text;
  value->dtype = type->dtype;
  if (type->dtype == DType::foreign) value->type_name = type->name;
  value->complex = type->complex;
  value->integer = id.items[4]->integer;
  return value;
}

// Protocol 0 has it as Python prints it: ('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 96)
PickleValue* Unpickler::storage_in_line() {
  static const std::regex pattern(
      "\\('storage', <class 'torch\\.([A-Za-z0-9_.]+)'>, '([^']*)', '[^']*', ([0-9]{1,18})(, "
      "None)?\\)");
  const std::string text = line();
  std::smatch found;
  if (!std::regex_match(text, found, pattern))
    refuse("refers to something that is no tensor storage");
  PickleValue* elements = make(Kind::integer);
  elements->integer = std::stoll(found[3]);
  PickleValue* id = make(Kind::list);
  id->items = {make_text("storage"), global("torch", found[1]), make_text(found[2]),
               make(Kind::none), elements};
  return storage(*id);
}

// Of protocols 0 and 1; 00 and 01 are False and True.
PickleValue* Unpickler::integer_in_line(bool may_be_boolean) {
  std::string text = line();
  PickleValue* made = make(Kind::integer);
  if (may_be_boolean && (text == "00" || text == "01")) {
    made->kind = Kind::boolean;
    made->integer = text == "01";
    return made;
  }
  if (!text.empty() && text.back() == 'L') text.pop_back();
  const char* const end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, made->integer);
  if (error == std::errc::result_out_of_range) {  // PyTorch's magic number
    made->kind = Kind::text;
    made->text = text;
  } else if (error != std::errc{} || at != end) {
    refuse("has a malformed number");
  }
  return made;
}

// A text of protocol 0: Latin-1, and \u and \U of what is not.
std::string Unpickler::escaped_line() {
  const std::string raw = line();
  std::string text;
  for (std::size_t i = 0; i < raw.size(); ++i) {
    const bool wide = raw[i] == '\\' && i + 1 < raw.size() && raw[i + 1] == 'U';
    if (!wide && !(raw[i] == '\\' && i + 1 < raw.size() && raw[i + 1] == 'u')) {
      append_utf8(text, static_cast<unsigned char>(raw[i]));
      continue;
    }
    const std::size_t digits = wide ? 8 : 4;
    std::uint32_t code = 0;
    const char* const begin = raw.data() + i + 2;
    const char* const end = raw.data() + std::min(raw.size(), i + 2 + digits);
    const auto [at, error] = std::from_chars(begin, end, code, 16);
    if (error != std::errc{} || at != begin + digits) refuse("has a malformed text");
    append_utf8(text, code);
    i += 1 + digits;
  }
  return text;
}

PickleValue* Unpickler::rebuild_tensor(const PickleValue& arguments) {
  // (storage, offset, size, stride, ...)
  const auto& a = arguments.items;
  if (a.size() < 4 || a[0]->kind != Kind::storage || a[1]->kind != Kind::integer ||
      a[1]->integer < 0 || a[2]->kind != Kind::list || a[3]->kind != Kind::list ||
      a[2]->items.size() != a[3]->items.size() || a[2]->items.size() > 8)
    refuse("rebuilds a tensor from something else");
  PickleValue* tensor = make(Kind::tensor);
  tensor->items = {a[0]};
  tensor->dtype = a[0]->dtype;
  tensor->type_name = a[0]->type_name;
  tensor->complex = a[0]->complex;
  if (a.size() > 6 && a[6]->kind == Kind::name) {  // version 3: of a storage of bytes
    const TorchType* type = find_type(element_types, a[6]->text);
    if (!type) refuse("has a tensor of unknown type " + a[6]->text);
    tensor->dtype = type->dtype;
    if (type->dtype == DType::foreign) tensor->type_name = type->name;
    tensor->complex = type->complex;
  }
  tensor->integer = a[1]->integer;
  const auto naturals = [&](const PickleValue& list, std::vector<std::uint64_t>& out) {
    for (const PickleValue* item : list.items) {
      if (item->kind != Kind::integer || item->integer < 0)
        refuse("has a tensor with a negative size or stride");
      out.push_back(static_cast<std::uint64_t>(item->integer));
    }
  };
  naturals(*a[2], tensor->shape);
  naturals(*a[3], tensor->strides);
  return tensor;
}

PickleValue* Unpickler::reduce(const PickleValue& callable, const PickleValue& arguments) {
  if (callable.kind != Kind::name || arguments.kind != Kind::list)
    refuse("calls something that is no known function");
  if (is_plain(callable.text)) return make(Kind::plain);
  if (is_dictionary(callable.text) || is_collection(callable.text)) {
    PickleValue* made = make(is_dictionary(callable.text) ? Kind::dictionary : Kind::list);
    for (const PickleValue* argument : arguments.items)
      if (argument->kind == made->kind) {
        spend(argument->items.size());
        made->items = argument->items;
      }
    return made;
  }
  if (callable.text == "collections.OrderedDict") {
    PickleValue* dictionary = make(Kind::dictionary);
    if (arguments.items.empty()) return dictionary;
    // OrderedDict([(key, value), ...]), as protocols 0 and 1 have it
    if (arguments.items.size() != 1 || arguments.items[0]->kind != Kind::list)
      refuse("builds a dictionary from something else");
    for (const PickleValue* pair : arguments.items[0]->items) {
      if (pair->kind != Kind::list || pair->items.size() != 2)
        refuse("builds a dictionary from something else");
      spend(2);
      dictionary->items.insert(dictionary->items.end(), pair->items.begin(), pair->items.end());
    }
    return dictionary;
  }
  if (callable.text == "torch._utils._rebuild_tensor_v2" ||
      callable.text == "torch._utils._rebuild_tensor_v3" ||
      callable.text == "torch._utils._rebuild_tensor")
    return rebuild_tensor(arguments);
  if (callable.text == "torch._utils._rebuild_parameter" ||
      callable.text == "torch._utils._rebuild_parameter_with_state") {
    if (arguments.items.empty() || arguments.items[0]->kind != Kind::tensor)
      refuse("rebuilds a parameter from something else");
    PickleValue* tensor = make(Kind::tensor);
    *tensor = *arguments.items[0];
    return tensor;
  }
  if (callable.text == "torch.Size" && arguments.items.size() == 1 &&
      arguments.items[0]->kind == Kind::list) {
    PickleValue* list = make(Kind::list);
    spend(arguments.items[0]->items.size());
    list->items = arguments.items[0]->items;
    return list;
  }
  refuse("calls " + callable.text + ", which is no function");
}

const PickleValue& Unpickler::load() {
  stack_.clear();
  marks_.clear();
  memo_.clear();
  buffer_.clear();
  begin_ += std::exchange(at_, 0);
  const auto make_list = [&](std::size_t count) {
    PickleValue* list = make(Kind::list);
    list->items.resize(count);
    for (std::size_t i = count; i-- > 0;) list->items[i] = pop();
    push(list);
  };
  const auto make_integer = [&](std::int64_t value) {
    PickleValue* made = make(Kind::integer);
    made->integer = value;
    push(made);
  };
  const auto make_long = [&](std::uint64_t count) {
    // Two's complement, little-endian; PyTorch's magic number has ten bytes and is kept as text.
    const std::string raw = bytes(count);
    PickleValue* made = make(Kind::integer);
    made->text = raw;
    if (count > 0 && count <= 8) {
      std::uint64_t value = (raw.back() & 0x80) != 0 ? ~std::uint64_t{0} : 0;
      for (std::size_t i = count; i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
      made->integer = static_cast<std::int64_t>(value);
    } else if (count > 8) {
      made->kind = Kind::text;
    }
    push(made);
  };
  const auto number_in_line = [&](auto value) {
    const std::string text = line();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size()) refuse("has a malformed number");
    return value;
  };
  for (;;) {
    switch (const std::uint8_t opcode = byte()) {
      case op_proto:
        if (byte() > 5) refuse("has an unknown protocol");
        break;
      case op_frame:
        integer<std::uint64_t>();
        break;
      case op_stop: {
        const PickleValue* value = pop();
        return *value;
      }
      case op_mark:
        if (marks_.size() == max_values) refuse("is nested too deeply");
        marks_.push_back(stack_.size());
        break;
      case op_pop:
        pop();
        break;
      case op_pop_mark:
        pop_to_mark();
        break;
      case op_dup:
        push(top());
        break;
      case op_none:
        push(make(Kind::none));
        break;
      case op_newtrue:
      case op_newfalse: {
        PickleValue* value = make(Kind::boolean);
        value->integer = opcode == op_newtrue;
        push(value);
        break;
      }
      case op_int:
      case op_long:
        push(integer_in_line(opcode == op_int));
        break;
      case op_binint:
        make_integer(static_cast<std::int32_t>(integer<std::uint32_t>()));
        break;
      case op_binint1:
        make_integer(byte());
        break;
      case op_binint2:
        make_integer(integer<std::uint16_t>());
        break;
      case op_long1:
        make_long(byte());
        break;
      case op_long4:
        make_long(integer<std::uint32_t>());
        break;
      case op_float: {
        PickleValue* value = make(Kind::real);
        value->real = number_in_line(double{});
        push(value);
        break;
      }
      case op_binfloat: {
        std::uint64_t bits = 0;
        for (int i = 0; i < 8; ++i) bits = bits << 8 | byte();
        PickleValue* value = make(Kind::real);
        value->real = std::bit_cast<double>(bits);
        push(value);
        break;
      }
      case op_unicode:
        push(make_text(escaped_line()));
        break;
      case op_string: {
        const std::string quoted = line();
        if (quoted.size() < 2 || quoted.front() != quoted.back() ||
            quoted.find('\\') != std::string::npos)
          refuse("has a malformed text");
        push(make_text(quoted.substr(1, quoted.size() - 2)));
        break;
      }
      case op_short_binstring:
      case op_short_binunicode:
      case op_short_binbytes:
        push(make_text(bytes(byte())));
        break;
      case op_binstring:
      case op_binunicode:
      case op_binbytes:
        push(make_text(bytes(integer<std::uint32_t>())));
        break;
      case op_binunicode8:
      case op_binbytes8:
        push(make_text(bytes(integer<std::uint64_t>())));
        break;
      case op_empty_list:
      case op_empty_tuple:
      case op_empty_set:
        make_list(0);
        break;
      case op_tuple1:
      case op_tuple2:
      case op_tuple3:
        make_list(opcode - op_tuple1 + std::size_t{1});
        break;
      case op_tuple:
      case op_list: {
        const auto values = pop_to_mark();
        PickleValue* list = make(Kind::list);
        list->items.assign(values.begin(), values.end());
        push(list);
        break;
      }
      case op_append: {
        const PickleValue* value = pop();
        if (top()->kind != Kind::list) refuse("appends to what is no list");
        spend(1);
        top()->items.push_back(value);
        break;
      }
      case op_appends:
      case op_additems: {
        const auto values = pop_to_mark();
        if (top()->kind != Kind::list) refuse("appends to what is no list");
        top()->items.insert(top()->items.end(), values.begin(), values.end());
        break;
      }
      case op_empty_dict:
        push(make(Kind::dictionary));
        break;
      case op_dict: {
        const auto values = pop_to_mark();
        PickleValue* dictionary = make(Kind::dictionary);
        set_items(dictionary, values);
        push(dictionary);
        break;
      }
      case op_setitem: {
        PickleValue* value = pop();
        PickleValue* key = pop();
        spend(2);
        set_items(top(), {key, value});
        break;
      }
      case op_setitems: {
        const auto values = pop_to_mark();
        set_items(top(), values);
        break;
      }
      case op_global: {
        const std::string module = line();
        push(global(module, line()));
        break;
      }
      case op_stack_global: {
        const PickleValue* global_name = pop();
        const PickleValue* module = pop();
        push(global(module->text, global_name->text));
        break;
      }
      case op_newobj:
      case op_reduce: {
        const PickleValue* arguments = pop();
        const PickleValue* callable = pop();
        push(reduce(*callable, *arguments));
        break;
      }
      case op_build:
        // PyTorch hangs the modules' versions on the state dictionary; they change no tensor.
        pop();
        if (top()->kind != Kind::dictionary && top()->kind != Kind::plain)
          refuse("sets the state of what is no dictionary");
        break;
      case op_persid:
        push(storage_in_line());
        break;
      case op_binpersid:
        push(storage(*pop()));
        break;
      case op_put:
        remember(number_in_line(std::uint64_t{}));
        break;
      case op_binput:
        remember(byte());
        break;
      case op_long_binput:
        remember(integer<std::uint32_t>());
        break;
      case op_memoize:
        remember(memo_.size());
        break;
      case op_get:
        push(memo(number_in_line(std::uint64_t{})));
        break;
      case op_binget:
        push(memo(byte()));
        break;
      case op_long_binget:
        push(memo(integer<std::uint32_t>()));
        break;
      default:
        refuse("has opcode " + std::to_string(opcode) +
               ", which no state dictionary needs: " + cure_);
    }
  }
}

}  // namespace personalize::tools
