// Files that are no model of a format that is read, told by their first bytes and their names.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <regex>
#include <string>
#include <string_view>

#include "convert/tensors.hpp"
#include "data/fields.hpp"

namespace personalize::tools {
namespace foreign_files {

using std::literals::operator""sv;

struct Kind {
  std::string_view begins, says;
  std::size_t at = 0;  // where those bytes stand
};

constexpr std::string_view lfs =
    "a Git LFS pointer, not the file that it stands for; run `git lfs pull` where it was cloned";
constexpr std::string_view llama =
    "a file of llama.cpp, which holds a language model; nothing here can run one";
constexpr std::string_view saved_model =
    "a TensorFlow SavedModel, which is not read; export it as ONNX: python -m tf2onnx.convert "
    "--saved-model FOLDER --output model.onnx";
constexpr std::string_view merge =
    "save it as one, as by save_pretrained(folder, max_shard_size=\"100GB\"), and give that file";
constexpr std::string_view joblib =
    "a compressed file, perhaps of joblib, which is not read; save the model's matrices by "
    "numpy.savez(path, user_factors=..., item_factors=...)";
constexpr std::string_view pickle =
    "a pickle, which could run code as it is read; save the model's matrices by "
    "numpy.savez(path, user_factors=..., item_factors=...)";
constexpr std::string_view unpack = "a compressed file; unpack it and give the model that is in it";

constexpr Kind kinds[] = {
    {"version https://git-lfs"sv, lfs},
    {"version https://hawser"sv, lfs},
    {"\x89HDF\r\n\x1a\n"sv,
     "an HDF5 file (Keras .h5), which is not read; save its weights by "
     "numpy.savez(path, **{w.name: w.numpy() for w in model.weights}) and name them by --mapping"},
    {"GGUF"sv, llama},
    {"ggjt"sv, llama},
    {"tjgg"sv, llama},
    {"lmgg"sv, llama},
    {"TFL3"sv, "a TensorFlow Lite model, which is not read; export the original as ONNX", 4},
    {"ORTM"sv, "a model in ONNX Runtime's own format; give the .onnx file it was made from", 4},
    {"\x08\x01\x12"sv, saved_model},
    {"\x1f\x8b"sv, unpack},
    {"BZh"sv, unpack},
    {"\xfd\x37zXZ"sv, unpack},
    {"\x28\xb5\x2f\xfd"sv, unpack},
    {"\x04\x22\x4d\x18"sv, unpack},
    {"7z\xbc\xaf\x27\x1c"sv, unpack},
    {"Rar!"sv, unpack},
    {"ustar"sv, "a tar archive; unpack it and give the model that is in it", 257},
    {"\x78\x01"sv, joblib},
    {"\x78\x5e"sv, joblib},
    {"\x78\x9c"sv, joblib},
    {"\x78\xda"sv, joblib},
    {"ZF0x"sv, joblib},
    {"ccopy_reg\n"sv, pickle},
    {"c__builtin__\n"sv, pickle},
    {"(dp"sv, pickle},
    {"(lp"sv, pickle},
    {"PAR1"sv, "a Parquet table; a model is wanted"},
    {"ARROW1"sv, "an Arrow table; a model is wanted"},
    {"SQLite format 3"sv, "an SQLite database; a model is wanted"},
    {"MATLAB 5.0"sv, "a MATLAB file, which is not read; save its matrices by numpy.savez"},
};

bool is_text(std::string_view head) {
  return std::all_of(head.begin(), head.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte >= 32 || c == '\n' || c == '\r' || c == '\t';
  });
}

std::string describe_text(const std::string& path, std::string_view head) {
  if (head.starts_with("\xef\xbb\xbf")) head.remove_prefix(3);
  while (!head.empty() && std::isspace(static_cast<unsigned char>(head.front())))
    head.remove_prefix(1);
  const std::string lower = lower_case(head.substr(0, 200));
  if (lower.starts_with("<!doctype html") || lower.starts_with("<html") ||
      lower.starts_with("<head") || lower.starts_with("<!--"))
    return "an HTML page, as a server sends in place of a file; download the model again, with the "
           "link of the file itself";
  if (lower.starts_with("<"))
    return "an XML text, as a server sends in place of a file; download the model again";
  if (head.starts_with("{") &&
      (path.ends_with(".index.json") || head.find("\"weight_map\"") != std::string_view::npos))
    return "the index of a model that lies in several files (shards); " + std::string(merge);
  if (head.starts_with("{") || head.starts_with("["))
    return "a JSON text, which holds no weights; give the model's own file";
  std::string line(head.substr(0, std::min<std::size_t>(head.find_first_of("\r\n"), 60)));
  return "a text that begins '" + line + "'; a model is wanted";
}

}  // namespace foreign_files

std::string folder_kind(const std::string& path) {
  const std::filesystem::path folder(path);
  const auto holds = [&](const char* name) {
    std::error_code error;
    return std::filesystem::exists(folder / name, error);
  };
  if (holds("saved_model.pb")) return std::string(foreign_files::saved_model);
  for (const char* name : {"model.safetensors", "pytorch_model.bin", "model.onnx", "model.pt"})
    if (holds(name)) return "a folder; give the model in it, " + (folder / name).string();
  if (holds("data.pkl")) return "a folder that a PyTorch file was unpacked to; give the file";
  return "a folder; give the model's file";
}

std::string shard_kind(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  static const std::regex pattern("-[0-9]+-of-0*([1-9][0-9]*)");
  std::smatch found;
  if (!std::regex_search(name, found, pattern) || found[1] == "1") return "";
  return "one of " + found[1].str() + " files that hold a model together (shards); " +
         std::string(foreign_files::merge);
}

std::string foreign_kind(const std::string& path, std::string_view head) {
  using namespace foreign_files;
  if (head.empty()) return "empty; copy it again";
  for (const Kind& kind : kinds)
    if (head.size() >= kind.at + kind.begins.size() &&
        head.substr(kind.at, kind.begins.size()) == kind.begins)
      return std::string(kind.says);
  return is_text(head) ? describe_text(path, head) : "";
}

}  // namespace personalize::tools
