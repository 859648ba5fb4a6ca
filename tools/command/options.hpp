// The options that subcommands share: one name, one meaning and one range each, and one way to show
// a default.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

namespace option_check {

// The option with a refusal of what is no number in [low, high].
template <class T>
CLI::Option* in_range(CLI::Option* option, double low, double high) {
  const auto check = [low, high](const std::string& given) -> std::string {
    T number{};
    if (!CLI::detail::lexical_cast(given, number))
      return "'" + given + "' is not a " + (std::is_integral_v<T> ? "whole number" : "number") +
             " in " + range_text(low, high);
    return range_refusal(static_cast<double>(number), low, high);
  };
  return option->check(CLI::Validator(check, ""));
}

}  // namespace option_check

// --model,-m: a model file to read.
CLI::Option* add_model(CLI::App& command, std::string& path);
// The same where it is all that the subcommand is about: also as an argument.
CLI::Option* add_model_argument(CLI::App& command, std::string& path);

// --interactions,-i, also as an argument.
CLI::Option* add_interactions(CLI::App& command, std::string& path, const std::string& text);

// --output,-o: the file to write.
CLI::Option* add_output(CLI::App& command, std::string& path, const std::string& text);

CLI::Option* add_event_type(CLI::App& command, std::string& type);
CLI::Option* add_skip_bad_rows(CLI::App& command, bool& skip);
CLI::Option* add_json(CLI::App& command, bool& json);

// --threads: 0 for a thread a core.
CLI::Option* add_threads(CLI::App& command, unsigned& threads);

// --element-type: int8, int4 or f32, as `personalize inspect` names them.
CLI::Option* add_element_type(CLI::App& command, ElementType& type);

// A number in [low, high], which --help and a refusal name; the value that it has is the default.
template <class T>
CLI::Option* add_number(CLI::App& command, const std::string& names, T& value,
                        const std::string& text, double low, double high) {
  return option_check::in_range<T>(
             command.add_option(names, value, text + ", " + range_text(low, high)), low, high)
      ->capture_default_str();
}

// The same with a default that is worked out later: `otherwise` says what it is.
template <class T>
CLI::Option* add_number(CLI::App& command, const std::string& names, std::optional<T>& value,
                        const std::string& text, double low, double high,
                        const std::string& otherwise) {
  return option_check::in_range<T>(
             command.add_option(names, value, text + ", " + range_text(low, high)), low, high)
      ->default_str(otherwise);
}

// One of a few words.
template <class T>
CLI::Option* add_choice(CLI::App& command, const std::string& names, T& value,
                        const std::vector<std::pair<std::string, T>>& choices,
                        const std::string& text) {
  std::string words, initial;
  for (const auto& [word, meaning] : choices) {
    words += (words.empty() ? "" : ", ") + word;
    if (meaning == value) initial = word;
  }
  const auto chosen = [choices](const std::string& given) -> std::optional<T> {
    for (const auto& [word, meaning] : choices)
      if (word == given) return meaning;
    return std::nullopt;
  };
  const auto check = [chosen, words](const std::string& given) -> std::string {
    return chosen(given) ? "" : "'" + given + "' is not one of " + words;
  };
  return command
      .add_option_function<std::string>(
          names, [&value, chosen](const std::string& given) { value = *chosen(given); },
          text + ": " + words)
      ->check(CLI::Validator(check, ""))
      ->default_str(initial);
}

}  // namespace personalize::tools
