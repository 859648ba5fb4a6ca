#include "state/state.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "state/export.hpp"
#include "state/repair.hpp"
#include "state/report.hpp"

namespace personalize::tools {
namespace state_command {

constexpr const char* as_it_lies =
    "Reads the files as they lie: takes no lock, changes nothing, and works while another process "
    "has the folder open.";

CLI::App* add(CLI::App& state, const char* name, const char* text, const std::string& more) {
  CLI::App* const command = state.add_subcommand(name, text);
  command->footer(more);
  command->get_formatter()->column_width(36);
  return command;
}

void add_path(CLI::App& command, std::string& path, const std::string& text) {
  command.add_option("folder", path, text)->required();
}

void print_report(const StateReport& report, bool json, void (*print)(const StateReport&)) {
  if (json)
    print_json(report.says);
  else
    print(report);
  std::fflush(stdout);
  if (!report.failure.empty()) throw Failure(report.failure);
}

void print_repaired(const StateRepair& options, const StateRepaired& repaired, bool json) {
  if (json)
    return print_json({{"folder", printable(options.folder)},
                       {"dry_run", options.dry_run},
                       {"steps", repaired.steps},
                       {"lost_records", repaired.lost_records},
                       {"lost_bytes", repaired.lost_bytes}});
  for (const std::string& step : repaired.steps) std::printf("%s\n", printable(step).c_str());
  if (repaired.steps.empty())
    std::printf("%s: sound; nothing to repair\n", printable(options.folder).c_str());
  else
    std::printf("%s %llu bytes with %llu whole records of journals; the originals %s\n",
                options.dry_run ? "dry run: would give up" : "given up:",
                static_cast<unsigned long long>(repaired.lost_bytes),
                static_cast<unsigned long long>(repaired.lost_records),
                options.dry_run ? "would stay as NAME.damaged" : "stay as NAME.damaged");
}

}  // namespace state_command

void add_state(CLI::App& app) {
  using namespace state_command;
  CLI::App* const state =
      app.add_subcommand("state", "Look at, check, repair and export a recommender's folder");
  state->require_subcommand(1);
  state->footer("personalize help state SUBCOMMAND shows the options of one.");

  struct Report {
    std::string path;
    bool json = false;
  };
  constexpr const char* folder_or_file = "Folder of Recommender::open, or one .pzs or .pzj file";
  const auto inspected = std::make_shared<Report>();
  CLI::App* const inspect =
      add(*state, "inspect", "Show what is there, and of which model", as_it_lies);
  add_path(*inspect, inspected->path, folder_or_file);
  add_json(*inspect, inspected->json);
  inspect->callback([inspected] {
    print_report(inspect_state(inspected->path), inspected->json, print_inspected);
  });

  const auto verified = std::make_shared<Report>();
  CLI::App* const verify =
      add(*state, "verify", "Read every byte; name what is damaged, with file and offset",
          std::string("Exit status 1 where something is damaged. The torn end of a last record, as "
                      "a crash leaves it, is no damage.\nWhat was learnt in terms of a model's "
                      "vectors is compared with its checksums alone.\n") +
              as_it_lies);
  add_path(*verify, verified->path, folder_or_file);
  add_json(*verify, verified->json);
  verify->callback(
      [verified] { print_report(verify_state(verified->path), verified->json, print_verified); });

  const auto repaired = std::make_shared<StateRepair>();
  const auto repaired_json = std::make_shared<bool>(false);
  CLI::App* const repair =
      add(*state, "repair", "Make a damaged folder one that Recommender::open takes",
          "A damaged journal is cut behind the last sound record before the damage; what lies "
          "behind it is given up.\nOf each file that is changed or given up, the original stays "
          "beside it as NAME.damaged.\nRefuses while a process has the folder open.");
  add_path(*repair, repaired->folder, "Folder of Recommender::open");
  repair
      ->add_option("--from", repaired->from,
                   "Copy that save(path) made: it becomes the folder's state, and all that is "
                   "there moves aside")
      ->option_text("COPY.pzs");
  repair->add_flag("--dry-run", repaired->dry_run, "Say what would be done, and change nothing");
  add_json(*repair, *repaired_json);
  repair->callback([repaired, repaired_json] {
    print_repaired(*repaired, repair_state(*repaired), *repaired_json);
  });

  const auto exported = std::make_shared<StateExport>();
  CLI::App* const events = add(
      *state, "export", "Write the users' remembered events, those of the journal included",
      std::string(
          "CSV is an interactions file for personalize train, without EVENT_TYPE where the model "
          "knew none.\nLeft out: events on "
          "items that wait for an update, and those that a journal has on items of a "
          "later model.\n") +
          as_it_lies);
  add_path(*events, exported->path, "Folder of Recommender::open, or one .pzs file");
  add_output(*events, exported->output, "File to write")->default_str("standard output");
  add_choice<EventFormat>(*events, "--format", exported->format,
                          {{"csv", EventFormat::csv}, {"jsonl", EventFormat::jsonl}},
                          "USER_ID,ITEM_ID,EVENT_TYPE,TIMESTAMP, or a user or session a line");
  events->add_option("--session-prefix", exported->session_prefix,
                     "With csv: also sessions, as users whose ids begin with this");
  exported->unknown_type = "unknown";
  events
      ->add_option("--unknown-type", exported->unknown_type,
                   "With csv: EVENT_TYPE of events of no type that the model knew")
      ->capture_default_str();
  events->callback([exported] {
    if (exported->session_prefix && exported->format != EventFormat::csv)
      throw Usage("--session-prefix has no meaning with --format jsonl, which names sessions");
    for (const std::string& text : export_state(*exported)) note("state export", text);
  });
}

}  // namespace personalize::tools
