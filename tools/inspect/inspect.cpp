#include "inspect/inspect.hpp"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace inspect_command {

// The metadata as JSON or, where it is not fit to be shown, a sentence that says so.
nlohmann::ordered_json metadata_of(const ModelParts& parts) {
  // Indented, a level makes up to 64 bytes of an empty list's two.
  constexpr std::size_t most_shown = std::size_t{1} << 18;
  if (parts.metadata.size() > most_shown)
    return "not shown: " + std::to_string(parts.metadata.size()) + " bytes";
  try {
    return parse_json(parts.metadata, "not shown: the metadata");
  } catch (const Failure& failure) {
    return failure.what();
  }
}

std::vector<SectionInfo> sections_of(const std::string& path, std::size_t& file_bytes) {
  const auto bytes = read_file(path, LoadLimits{}.file_bytes);
  if (!bytes) throw Failure(bytes.error().message);
  file_bytes = bytes->size();
  auto sections = list_sections(*bytes);
  if (!sections) throw Failure(path + ": " + sections.error().message);
  return std::move(*sections);
}

nlohmann::ordered_json describe(const std::string& path) {
  std::size_t file_bytes = 0;
  const std::vector<SectionInfo> sections = sections_of(path, file_bytes);
  const auto parts = read_model(path);
  if (!parts) throw Failure(parts.error().message);

  nlohmann::ordered_json out;
  out["model"] = path;
  out["bytes"] = file_bytes;
  out["items"] = parts->item_ids.size();
  out["dimension"] = parts->item_vectors.columns();
  for (const SectionInfo& s : sections)
    if (s.label() == "IVEC") out["item_vectors"] = std::string(personalize::name(s.element_type));
  out["event_types"] = nlohmann::ordered_json::array();
  for (std::size_t e = 0; e < parts->event_types.size(); ++e)
    out["event_types"].push_back(printable(parts->event_types[e]));
  out["time_gap_buckets"] = parts->time_gap_embedding.rows();
  out["users_with_state"] = parts->user_ids.size();
  out["metadata_fields"] = nlohmann::ordered_json::array();
  for (const MetadataField& field : parts->fields)
    out["metadata_fields"].push_back({{"name", printable(field.name)},
                                      {"kind", field.numeric ? "numeric" : "categorical"},
                                      {"embeddings", field.embedding.rows()}});
  out["encoder"] = nlohmann::ordered_json::array();
  for (const EncoderOp& op : parts->operations)
    out["encoder"].push_back(std::string(name(op.kind)));
  std::size_t parameters = 0;
  for (const Matrix& weight : parts->weights) parameters += weight.rows() * weight.columns();
  out["encoder_parameters"] = parameters;
  const Fingerprints fingerprints = fingerprints_of(*parts);
  out["fingerprints"] = {{"encoder", hexadecimal(fingerprints.encoder)},
                         {"items", hexadecimal(fingerprints.items)}};
  std::uint64_t raw = 0;
  out["sections"] = nlohmann::ordered_json::array();
  for (const SectionInfo& s : sections) {
    raw += s.raw_size;
    nlohmann::ordered_json shape = nlohmann::ordered_json::array();
    for (std::size_t d = 0; d < s.rank; ++d) shape.push_back(s.shape[d]);
    out["sections"].push_back({{"section", printable(s.label())},
                               {"element", std::string(personalize::name(s.element_type))},
                               {"shape", shape},
                               {"codec", s.codec == Codec::zstd ? "zstd" : "stored"},
                               {"chunks", s.chunk_count()},
                               {"stored_bytes", s.stored_size},
                               {"raw_bytes", s.raw_size}});
  }
  out["raw_bytes"] = raw;
  out["metadata"] = metadata_of(*parts);
  return out;
}

void print_text(const nlohmann::ordered_json& d) {
  const auto text = [&](const char* key) { return d[key].get<std::string>(); };
  const auto count = [](const nlohmann::ordered_json& value) {
    return value.get<unsigned long long>();
  };
  std::printf("%s: %llu bytes, %llu items, %llu dimensions, item vectors %s\n\n",
              printable(text("model")).c_str(), count(d["bytes"]), count(d["items"]),
              count(d["dimension"]), text("item_vectors").c_str());
  std::printf("%-10s %-7s %-16s %-7s %7s %12s %12s\n", "section", "element", "shape", "codec",
              "chunks", "stored", "raw");
  for (const auto& s : d["sections"])
    std::printf("%-10s %-7s %-16s %-7s %7llu %12llu %12llu\n",
                s["section"].get<std::string>().c_str(), s["element"].get<std::string>().c_str(),
                s["shape"].dump().c_str(), s["codec"].get<std::string>().c_str(),
                count(s["chunks"]), count(s["stored_bytes"]), count(s["raw_bytes"]));
  std::printf("\nencoder (%llu parameters):", count(d["encoder_parameters"]));
  for (const auto& op : d["encoder"]) std::printf(" %s", op.get<std::string>().c_str());
  std::printf("\ntime-gap buckets: %llu\nevent types: %s\nusers with a state: %llu\n",
              count(d["time_gap_buckets"]), d["event_types"].dump().c_str(),
              count(d["users_with_state"]));
  std::printf("fingerprints: encoder %s, items %s\n",
              d["fingerprints"]["encoder"].get<std::string>().c_str(),
              d["fingerprints"]["items"].get<std::string>().c_str());
  std::printf("metadata fields: %s\nmetadata:\n", d["metadata_fields"].dump().c_str());
  print_json(d["metadata"]);
}

}  // namespace inspect_command

void add_inspect(CLI::App& app) {
  using namespace inspect_command;
  struct Options {
    std::string model;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "Show what a model file holds");
  add_model_argument(*command, options->model);
  add_json(*command, options->json);
  command->callback([options] {
    const nlohmann::ordered_json description = describe(options->model);
    if (options->json)
      print_json(description);
    else
      print_text(description);
  });
}

}  // namespace personalize::tools
