#include "convert/convert.hpp"

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "command/output.hpp"
#include "convert/archive.hpp"
#include "convert/build.hpp"
#include "convert/check.hpp"
#include "convert/mapping.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace convert_command {

// Weights are noise to zstd: of f32 and int8 matrices, level 19 makes nothing smaller than level 3
// does, in 40 times the time.
constexpr int zstd_level = 3;

struct Options {
  std::string from, items, users, interactions, mapping, output, check, reference;
  bool to_safetensors = false, json = false, skip_bad_rows = false;
  ElementType element_type = ElementType::i8;
};

// A model file, or an archive of one, is complete in itself; anything else needs to be mapped.
struct Source {
  std::string format, architecture;
  std::optional<TensorFile> tensors;
  std::optional<Mapping> mapping;
  Catalogue catalogue;
};

bool is_model_file(const std::string& path) {
  const auto source = Input{path}.open();
  std::array<std::byte, detail::model_file.magic.size()> head{};
  if (source->size() < head.size()) return false;
  source->read(0, head);
  return std::memcmp(head.data(), detail::model_file.magic.data(), head.size()) == 0;
}

Source open_source(const Options& options) {
  Source source;
  if (is_model_file(options.from)) {
    source.format = source.architecture = "pzm";
    return source;
  }
  source.tensors = open_tensors({options.from});
  TensorFile& file = *source.tensors;
  source.format = file.format;
  if (is_archive(file)) {
    source.architecture = "personalize";
    return source;
  }
  if (!options.mapping.empty())
    source.mapping = read_mapping(options.mapping);
  else
    source.mapping = file.graph ? trace_graph(file) : recognise(file);
  Mapping& mapping = *source.mapping;
  source.architecture = mapping.architecture;

  const std::string order = mapping.item_ids.empty() ? options.items : mapping.item_ids;
  if (order.empty())
    throw Usage("needs --items items.csv: a row an item, in the order of the model's rows");
  source.catalogue.items = read_catalogue({.order = order,
                                           .items = options.items,
                                           .interactions = options.interactions,
                                           .skip_bad_rows = options.skip_bad_rows});
  source.catalogue.items.bad_rows.report("convert");
  const std::string users = options.users.empty() ? mapping.user_ids : options.users;
  if (!users.empty()) source.catalogue.user_ids = read_ids(users, "USER_ID");
  return source;
}

Built read_source(Source& source, const Options& options, ElementType type) {
  if (source.mapping) return build_model(*source.tensors, *source.mapping, source.catalogue, type);
  if (source.tensors) return {read_archive(*source.tensors, type), {}};
  auto parts = read_model(options.from);
  if (!parts) throw Failure(parts.error().message);
  return {std::move(*parts), {}};
}

nlohmann::ordered_json report(const Agreement& comparison) {
  nlohmann::ordered_json json{
      {"what", comparison.what}, {"with", comparison.with}, {"histories", comparison.histories}};
  if (comparison.hidden_deviation) json["hidden_deviation"] = *comparison.hidden_deviation;
  if (comparison.same_top20) json["same_top20"] = *comparison.same_top20;
  return json;
}

void print(const Agreement& comparison, std::FILE* to) {
  std::fprintf(to, "checked %zu histories, %s against %s:", comparison.histories,
               comparison.what.c_str(), comparison.with.c_str());
  if (comparison.hidden_deviation)
    std::fprintf(to, " hidden states within %.2g of theirs", *comparison.hidden_deviation);
  if (comparison.same_top20)
    std::fprintf(to, "%s the same top 20 in %.1f %%", comparison.hidden_deviation ? "," : "",
                 *comparison.same_top20 * 100);
  std::fprintf(to, "\n");
}

void require_agreement(const Agreement& comparison, const std::string& output) {
  if (comparison.agrees()) return;
  throw Failure(output + " does not agree: " + comparison.what + " differs from " +
                comparison.with + ", first " + comparison.first_difference +
                "; is the mapping right, and the items file in the model's order?");
}

// What `--check` compares with the weights as they were read. Whatever the element type of the file
// will be, only rounding may differ.
std::vector<Agreement> check_source(Source& source, const Built& built, const Options& options,
                                    const std::vector<History>& histories) {
  std::vector<Agreement> comparisons;
  // A known user's scores do not follow from a history alone.
  if (source.tensors && source.tensors->graph && built.parts.user_ids.empty())
    comparisons.push_back(
        compare_with_graph(built.parts, *source.tensors, *source.mapping, built.rows, histories));
  if (!options.reference.empty()) {
    TensorFile reference = open_tensors({options.reference});
    comparisons.push_back(compare_with_reference(built.parts, reference, histories));
  }
  for (const Agreement& comparison : comparisons) require_agreement(comparison, options.output);
  return comparisons;
}

void run(const Options& options) {
  if (options.to_safetensors && !options.check.empty())
    throw Usage("--check is for model files, not for --to safetensors");
  if (options.check.empty() && !options.reference.empty())
    throw Usage("--reference needs --check histories.csv");
  OutputFile output(options.output);
  if (output.direct() && !options.check.empty())
    throw Usage("--check reads the new file again; -o " + options.output + " is no regular file");
  if (output.standard_output() && options.json)
    throw Usage("--json and the file cannot both go to standard output");
  Source source = open_source(options);
  std::vector<std::string> notes;
  if (source.mapping) notes = source.mapping->notes;
  const ElementType type = options.to_safetensors ? ElementType::f32 : options.element_type;
  std::vector<Agreement> comparisons;
  std::vector<History> histories;
  const bool is_graph = source.tensors && source.tensors->graph;
  std::optional<Built> exact;  // its weights as they were read
  if (is_graph || !options.check.empty() || type == ElementType::f32)
    exact = read_source(source, options, ElementType::f32);
  if (is_graph)
    if (const std::string reason =
            verify_graph(exact->parts, *source.tensors, *source.mapping, exact->rows);
        !reason.empty())
      notes.push_back("not checked against the graph: " + reason);
  if (!options.check.empty()) {
    BadRows bad{.skip = options.skip_bad_rows};
    histories = read_histories(options.check, exact->parts, bad);
    bad.report("convert");
    comparisons = check_source(source, *exact, options, histories);
  }
  nlohmann::ordered_json summary;
  {
    std::optional<Built> approximate;
    if (type != ElementType::f32) {
      if (options.check.empty()) exact.reset();
      approximate = read_source(source, options, type);
    }
    const ModelParts& parts = (approximate ? *approximate : *exact).parts;
    if (options.to_safetensors)
      write_archive(parts, output);
    else
      output.append_model(parts, {.element_type = options.element_type, .zstd_level = zstd_level});
    output.commit();
    summary = {{"output", options.output},
               {"format", source.format},
               {"architecture", source.architecture},
               {"items", parts.item_ids.size()},
               {"dimension", parts.item_vectors.columns()},
               {"users", parts.user_ids.size()},
               {"bytes", output.size()},
               {"notes", notes}};
  }
  if (!options.check.empty()) {
    const auto model = Model::load(options.output);
    if (!model) throw Failure(model.error().message);
    comparisons.insert(comparisons.begin(), compare_with_source(**model, exact->parts, histories));
  }
  for (const std::string& note : notes)
    std::fprintf(stderr, "convert: %s: %s\n", options.from.c_str(), note.c_str());
  if (options.json) {
    summary["checks"] = nlohmann::ordered_json::array();
    for (const Agreement& comparison : comparisons) summary["checks"].push_back(report(comparison));
    print_json(summary);
  } else {
    std::FILE* const to = output.standard_output() ? stderr : stdout;
    std::fprintf(to, "%s: %s (%s), %zu items, %zu dimensions, %llu bytes\n", options.output.c_str(),
                 source.architecture.c_str(), source.format.c_str(),
                 summary["items"].get<std::size_t>(), summary["dimension"].get<std::size_t>(),
                 static_cast<unsigned long long>(output.size()));
    for (const Agreement& comparison : comparisons) print(comparison, to);
  }
  // Of an f32 file only rounding may differ; what others lose is reported.
  if (!comparisons.empty() && options.element_type == ElementType::f32)
    require_agreement(comparisons[0], options.output);
}

}  // namespace convert_command

void add_convert(CLI::App& app) {
  using namespace convert_command;
  auto options = std::make_shared<Options>();
  Options& o = *options;
  CLI::App* command = app.add_subcommand(
      "convert", "Make a model file from one that was trained elsewhere, or the other way round");
  command
      ->add_option("from,--from", o.from,
                   "safetensors, NumPy .npz or .npy, PyTorch .pt, ONNX, or a model file (.pzm); as "
                   "an argument or as an option")
      ->required();
  command->add_option("--items", o.items,
                      "CSV with ITEM_ID, a row an item in the order of the model's rows, and "
                      "metadata");
  command->add_option("--users", o.users,
                      "CSV with USER_ID in the model's order, where the model has users");
  command->add_option("--interactions,-i", o.interactions,
                      "CSV for item statistics: popularity, first and last timestamps");
  command->add_option("--mapping", o.mapping,
                      "JSON that says which tensor is what (tools/convert/README.md), for a model "
                      "that is not recognised");
  add_choice<bool>(*command, "--to", o.to_safetensors, {{"pzm", false}, {"safetensors", true}},
                   "Format to write");
  add_element_type(*command, o.element_type);
  add_output(*command, o.output, "File to write")->required();
  command->add_option(
      "--check", o.check,
      "Run the histories of this interactions CSV through the new file, the source in "
      "double precision and, of ONNX, the graph; fails where they differ");
  command->add_option("--reference", o.reference,
                      "With --check: a file with tensor 'hidden' [histories, d] or 'scores' "
                      "[histories, items] to compare with, too");
  add_skip_bad_rows(*command, o.skip_bad_rows);
  add_json(*command, o.json);
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
