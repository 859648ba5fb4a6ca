#include "inspect/inspect.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

nlohmann::json describe(const std::string& path) {
  const auto bytes = read_file(path, LoadLimits{}.file_bytes);
  if (!bytes) throw Failure(bytes.error().message);
  const auto sections = list_sections(*bytes);
  if (!sections) throw Failure(path + ": " + sections.error().message);
  const auto parts = read_model(*bytes);
  if (!parts) throw Failure(path + ": " + parts.error().message);

  nlohmann::json out;
  out["file"] = path;
  out["bytes"] = bytes->size();
  out["items"] = parts->item_ids.size();
  out["dimension"] = parts->item_vectors.columns();
  for (const SectionInfo& s : *sections)
    if (s.label() == "IVEC") out["item_vectors"] = std::string(personalize::name(s.element_type));
  out["event_types"] = nlohmann::json::array();
  for (std::size_t e = 0; e < parts->event_types.size(); ++e)
    out["event_types"].push_back(std::string(parts->event_types[e]));
  out["time_gap_buckets"] = parts->time_gap_embedding.rows();
  out["users_with_state"] = parts->user_ids.size();
  out["metadata_fields"] = nlohmann::json::array();
  for (const MetadataField& field : parts->fields)
    out["metadata_fields"].push_back({{"name", field.name},
                                      {"kind", field.numeric ? "numeric" : "categorical"},
                                      {"embeddings", field.embedding.rows()}});
  out["encoder"] = nlohmann::json::array();
  for (const EncoderOp& op : parts->operations)
    out["encoder"].push_back(std::string(name(op.kind)));
  std::size_t parameters = 0;
  for (const Matrix& weight : parts->weights) parameters += weight.rows() * weight.columns();
  out["encoder_parameters"] = parameters;
  std::uint64_t raw = 0;
  out["sections"] = nlohmann::json::array();
  for (const SectionInfo& s : *sections) {
    raw += s.raw_size;
    nlohmann::json shape = nlohmann::json::array();
    for (std::size_t d = 0; d < s.rank; ++d) shape.push_back(s.shape[d]);
    out["sections"].push_back({{"section", s.label()},
                               {"element", std::string(personalize::name(s.element_type))},
                               {"shape", shape},
                               {"codec", s.codec == Codec::zstd ? "zstd" : "stored"},
                               {"chunks", s.chunk_count()},
                               {"stored_bytes", s.stored_size},
                               {"raw_bytes", s.raw_size}});
  }
  out["raw_bytes"] = raw;
  auto metadata = nlohmann::json::parse(parts->metadata, nullptr, false);
  out["metadata"] = metadata.is_discarded() ? nlohmann::json(nullptr) : std::move(metadata);
  return out;
}

void print_text(const nlohmann::json& d) {
  std::cout << d["file"].get<std::string>() << ": " << d["bytes"] << " bytes, " << d["items"]
            << " items, " << d["dimension"] << " dimensions, item vectors "
            << d["item_vectors"].get<std::string>() << "\n\n";
  std::printf("%-10s %-7s %-16s %-7s %7s %12s %12s\n", "section", "element", "shape", "codec",
              "chunks", "stored", "raw");
  for (const auto& s : d["sections"])
    std::printf("%-10s %-7s %-16s %-7s %7llu %12llu %12llu\n",
                s["section"].get<std::string>().c_str(), s["element"].get<std::string>().c_str(),
                s["shape"].dump().c_str(), s["codec"].get<std::string>().c_str(),
                s["chunks"].get<unsigned long long>(), s["stored_bytes"].get<unsigned long long>(),
                s["raw_bytes"].get<unsigned long long>());
  std::fflush(stdout);
  std::cout << "\nencoder (" << d["encoder_parameters"] << " parameters):";
  for (const auto& op : d["encoder"]) std::cout << ' ' << op.get<std::string>();
  std::cout << "\ntime-gap buckets: " << d["time_gap_buckets"]
            << "\nevent types: " << d["event_types"].dump()
            << "\nusers with a state: " << d["users_with_state"]
            << "\nmetadata fields: " << d["metadata_fields"].dump() << "\nmetadata:\n"
            << d["metadata"].dump(2) << '\n';
}

}  // namespace

void add_inspect(CLI::App& app) {
  struct Options {
    std::string model;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "Show what a model file holds");
  command->add_option("model", options->model, "Model file (.pzm)")->required();
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options] {
    const nlohmann::json description = describe(options->model);
    if (options->json)
      std::cout << description.dump(2) << '\n';
    else
      print_text(description);
  });
}

}  // namespace personalize::tools
