#include "command/options.hpp"

namespace personalize::tools {

CLI::Option* add_model(CLI::App& command, std::string& path) {
  return command.add_option("--model,-m", path, "Model file (.pzm)");
}

CLI::Option* add_model_argument(CLI::App& command, std::string& path) {
  return command
      .add_option("model,--model,-m", path, "Model file (.pzm); as an argument or as an option")
      ->required();
}

CLI::Option* add_interactions(CLI::App& command, std::string& path, const std::string& text) {
  return command.add_option("interactions,--interactions,-i", path,
                            text + "; as an argument or as an option");
}

CLI::Option* add_output(CLI::App& command, std::string& path, const std::string& text) {
  return command.add_option("--output,-o", path, text);
}

CLI::Option* add_event_type(CLI::App& command, std::string& type) {
  return command.add_option("--event-type", type, "Use only interactions of this EVENT_TYPE");
}

CLI::Option* add_skip_bad_rows(CLI::App& command, bool& skip) {
  return command.add_flag("--skip-bad-rows", skip, "Leave out malformed rows and report them");
}

CLI::Option* add_json(CLI::App& command, bool& json) {
  return command.add_flag("--json", json, "Print JSON");
}

CLI::Option* add_threads(CLI::App& command, unsigned& threads) {
  return add_number(command, "--threads", threads, "0: a thread a core", 0, 1024);
}

CLI::Option* add_element_type(CLI::App& command, ElementType& type) {
  return add_choice<ElementType>(
      command, "--element-type", type,
      {{"int8", ElementType::i8}, {"int4", ElementType::i4}, {"f32", ElementType::f32}},
      "Of the matrices in the model file");
}

}  // namespace personalize::tools
