#include "state/report.hpp"

#include <array>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "state/contents.hpp"
#include "state/folder.hpp"

namespace personalize::tools {
namespace state_report {

using Json = nlohmann::ordered_json;

// Unix seconds, and what they are.
std::string time_text(std::int64_t seconds) {
  if (seconds == no_timestamp) return "unknown";
  const auto time = static_cast<std::time_t>(seconds);
  std::tm parts{};
  std::array<char, 32> text{};
  if (::gmtime_r(&time, &parts))
    std::strftime(text.data(), text.size(), " (%Y-%m-%dT%H:%M:%SZ)", &parts);
  return std::to_string(seconds) + text.data();
}

Json describe(const Error& error) {
  Json out{{"code", name(error.code)}, {"message", error.message}};
  if (error.offset) out["offset"] = *error.offset;
  return out;
}

Json describe(const StateContents& state) {
  Json out{{"bytes", state.bytes},
           {"number", state.head.number},
           {"saved_at", state.head.saved_at},
           {"next_record", state.head.next_sequence},
           {"folder_id", hexadecimal(state.head.lineage)},
           {"model",
            {{"encoder", hexadecimal(state.head.model.encoder)},
             {"items", hexadecimal(state.head.model.items)},
             {"dimension", state.head.dimension},
             {"state_floats", state.head.state_size}}},
           {"items", state.items.size()},
           {"event_types", Json::array()},
           {"users", state.users},
           {"sessions", state.sessions},
           {"with_state", state.with_state},
           {"with_events", state.with_events},
           {"remembered_events", state.remembered_events},
           {"forgotten_users_of_the_model", state.forgotten},
           {"counters",
            {{"items", state.items_counted},
             {"interactions", state.interactions},
             {"positive", state.positive},
             {"expected", state.expected}}},
           {"slates", state.slates},
           {"context_rows", state.contexts},
           {"event_ids", state.event_ids},
           {"items_waiting", state.waiting.size()},
           {"items_put", state.known},
           {"items_removed", state.removed}};
  for (std::size_t t = 0; t < state.event_types.size(); ++t)
    out["event_types"].push_back(printable(state.event_types[t]));
  return out;
}

Json describe(const JournalContents& journal) {
  Json out{{"bytes", journal.bytes},
           {"number", journal.header.number},
           {"folder_id", hexadecimal(journal.header.lineage)},
           {"model",
            {{"encoder", hexadecimal(journal.header.model[0])},
             {"items", hexadecimal(journal.header.model[1])}}},
           {"records", journal.records}};
  if (journal.records > 0) {
    out["first_record"] = journal.first;
    out["last_record"] = journal.last;
  }
  out["by_type"] = Json::object();
  for (const auto& [type, count] : journal.by_type) {
    const std::string_view known = record_name(type);
    out["by_type"][known.empty() ? "type " + std::to_string(type) : std::string(known)] = count;
  }
  out["torn_bytes"] = journal.torn;
  if (journal.never_begun) out["never_begun"] = true;
  out["ended_in_peace"] = journal.closed;
  if (journal.error) out["error"] = describe(*journal.error);
  return out;
}

unsigned long long count(const Json& value) { return value.get<unsigned long long>(); }
std::string text(const Json& value) { return printable(value.get<std::string>()); }

void print_state(const Json& state) {
  std::printf("state %llu, saved at %s, %llu bytes\n", count(state["number"]),
              time_text(state["saved_at"].get<std::int64_t>()).c_str(), count(state["bytes"]));
  const Json& model = state["model"];
  std::printf("  model         encoder %s, items %s; %llu dimensions, states of %llu floats\n",
              text(model["encoder"]).c_str(), text(model["items"]).c_str(),
              count(model["dimension"]), count(model["state_floats"]));
  std::printf("  items         %llu; %llu put and in, %llu removed, %llu wait for an update\n",
              count(state["items"]), count(state["items_put"]), count(state["items_removed"]),
              count(state["items_waiting"]));
  std::printf("  event types   %s\n", state["event_types"].dump().c_str());
  std::printf(
      "  users         %llu, and %llu sessions; %llu with a state, %llu with events, %llu events\n",
      count(state["users"]), count(state["sessions"]), count(state["with_state"]),
      count(state["with_events"]), count(state["remembered_events"]));
  const Json& counters = state["counters"];
  std::printf("  counters      %llu items; interactions %s, positive %s, expected %s\n",
              count(counters["items"]), number_text(counters["interactions"].get<double>()).c_str(),
              number_text(counters["positive"].get<double>()).c_str(),
              number_text(counters["expected"].get<double>()).c_str());
  std::printf("  slates        %llu remembered; %llu context rows; %llu event ids\n",
              count(state["slates"]), count(state["context_rows"]), count(state["event_ids"]));
}

void print_journal(const Json& journal) {
  std::printf("journal %llu, %llu bytes, %llu records", count(journal["number"]),
              count(journal["bytes"]), count(journal["records"]));
  if (journal.contains("first_record"))
    std::printf(" (%llu to %llu)", count(journal["first_record"]), count(journal["last_record"]));
  const char* separator = ": ";
  for (const auto& [type, records] : journal["by_type"].items()) {
    std::printf("%s%s %llu", separator, type.c_str(), count(records));
    separator = ", ";
  }
  std::printf("\n");
  if (count(journal["torn_bytes"]) > 0)
    std::printf("  torn: %llu bytes of a record that was not acknowledged, or is being written\n",
                count(journal["torn_bytes"]));
  if (journal.contains("never_begun"))
    std::printf("  never begun: the process ended while it made the file\n");
  if (journal.contains("error")) std::printf("  %s\n", text(journal["error"]["message"]).c_str());
}

std::string role_of(const StateFolder& folder, const std::string& name) {
  if (name.ends_with(".part")) return "left by a process that ended while it wrote";
  if (name.find(".damaged") != std::string::npos) return "moved aside by a repair";
  if (const auto state = detail::Keeper::number_of(name, "state-", ".pzs"))
    return *state == folder.states.back() ? "the present state" : "an earlier state";
  if (const auto journal = detail::Keeper::number_of(name, "journal-", ".pzj"))
    return folder.states.empty() || *journal >= folder.states.back()
               ? "what came after the present state"
               : "what came after an earlier state";
  return "none of a recommender's";
}

Json files_in(const StateFolder& folder) {
  Json files = Json::array();
  const auto add = [&](const std::string& name) {
    files.push_back({{"name", printable(name)},
                     {"bytes", file_bytes(folder.path_of(name))},
                     {"is", role_of(folder, name)}});
  };
  for (const std::uint64_t number : folder.states) add(detail::Keeper::state_name(number));
  for (const std::uint64_t number : folder.journals) add(detail::Keeper::journal_name(number));
  for (const std::string& name : folder.others) add(name);
  return files;
}

void require_state(const StateFolder& folder) {
  if (folder.states.empty())
    throw Failure(folder.path + ": holds no state file (state-NNNNNNNNNNNN.pzs)");
}

// "journal" or "state", by the file's first bytes; Failure where it is neither.
bool is_journal(const std::string& path) {
  auto source = detail::ByteSource::open(path);
  if (!source) throw Failure(source.error().message);
  detail::BareVector<std::byte> buffer;
  const std::size_t size = static_cast<std::size_t>(std::min<std::uint64_t>(source->size(), 8));
  const auto bytes = source->take(size, buffer, size);
  if (!bytes) throw Failure(bytes.error().message);
  const auto begins = [&](const auto& magic) {
    return size == 8 && std::memcmp(bytes->data(), magic.data(), 8) == 0;
  };
  if (begins(detail::state_file.magic)) return false;
  if (begins(detail::journal_magic)) return true;
  if (path.ends_with(".pzj")) return true;
  if (path.ends_with(".pzs")) return false;
  throw Failure(path + ": neither a state (.pzs) nor a journal (.pzj)");
}

bool is_folder(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error);
}

std::string sentence(const std::string& path, const Error& error) {
  return error.message.starts_with(path) ? error.message : path + ": " + error.message;
}

std::string cure(const StateFolder& folder) {
  return "; personalize state verify " + folder.path + " looks at every file";
}

}  // namespace state_report

StateReport inspect_state(const std::string& path) {
  using namespace state_report;
  StateReport report;
  RecordVisitor nothing;
  if (!is_folder(path)) {
    if (is_journal(path)) {
      const JournalContents journal = read_journal_file(path, {}, false, nothing);
      report.says["journals"] = Json::array({describe(journal)});
      if (journal.error) report.failure = sentence(path, *journal.error);
      return report;
    }
    StateContents state;
    if (const auto read = read_state(path, state); !read) throw Failure(read.error().message);
    report.says["state"] = describe(state);
    return report;
  }
  read_as_it_lies(path, [&](const StateFolder& folder) {
    require_state(folder);
    report.failure.clear();
    Json& out = report.says;
    out = {{"folder", folder.path}, {"files", files_in(folder)}};
    const auto fail = [&](const Error& error) {
      report.failure =
          error.message + "; personalize state verify " + folder.path + " looks at every file";
      return false;
    };
    StateContents state;
    if (const auto read = read_state(folder.state(folder.states.back()), state); !read) {
      out["error"] = describe(read.error());
      return fail(read.error());
    }
    out["state"] = describe(state);
    const JournalChain chain = read_journals(folder, state.head, nothing);
    out["journals"] = Json::array();
    bool closed = false;
    for (const auto& [number, journal] : chain.journals) {
      out["journals"].push_back(describe(journal));
      if (!journal.never_begun) closed = journal.closed;
    }
    out["ended_in_peace"] = closed && !chain.error;
    return chain.error ? fail(*chain.error) : true;
  });
  return report;
}

void print_inspected(const StateReport& report) {
  using namespace state_report;
  const Json& says = report.says;
  if (says.contains("files"))
    for (const Json& file : says["files"])
      std::printf("%-28s %12llu  %s\n", text(file["name"]).c_str(), count(file["bytes"]),
                  text(file["is"]).c_str());
  if (says.contains("state")) print_state(says["state"]);
  if (says.contains("journals"))
    for (const Json& journal : says["journals"]) print_journal(journal);
  if (says.contains("ended_in_peace"))
    std::printf(says["ended_in_peace"].get<bool>()
                    ? "the process ended in peace\n"
                    : "the process did not end in peace, or has the folder open\n");
}

namespace state_report {

// Looks at files, and keeps what was found.
class Verification {
 public:
  void one_state(const std::string& file, std::optional<std::uint64_t> number,
                 StateContents& state) {
    auto read = read_state(file, state);
    if (read && number && state.head.number != *number)
      read = Error{Errc::corrupt, file + ": is not the file that it is named after"};
    found(file, read ? std::optional<Error>{} : read.error(),
          std::to_string(state.users + state.sessions) + " users and sessions, " +
              std::to_string(state.items.size()) + " items");
  }
  void one_journal(const std::string& file, const detail::JournalExpectation& expected) {
    RecordVisitor nothing;
    journal(file, read_journal_file(file, expected, false, nothing));
  }
  void folder(const StateFolder& folder) {
    require_state(folder);
    files_ = Json::array();
    failure_.clear();
    StateContents state;
    for (const std::uint64_t number : folder.states) {
      state = {};
      one_state(folder.state(number), number, state);
    }
    // Journals that go on from a state that cannot be read are looked at one by one.
    std::uint64_t next = folder.states.back();
    if (files_.back()["sound"].get<bool>()) {
      RecordVisitor nothing;
      const JournalChain chain = read_journals(folder, state.head, nothing);
      for (const auto& [number, contents] : chain.journals)
        journal(folder.journal(number), contents);
      if (chain.missing) found(folder.journal(chain.broken), chain.error, "");
      next += chain.journals.size();
    }
    for (const std::uint64_t number : folder.journals)
      if (number >= next) one_journal(folder.journal(number), {.number = number});
  }
  bool sound() const { return failure_.empty(); }

  StateReport report() const {
    std::size_t damaged = 0;
    for (const Json& file : files_) damaged += file["sound"].get<bool>() ? 0 : 1;
    StateReport report{{{"files", files_}, {"damaged", damaged}}, failure_};
    if (damaged > 1)
      report.failure += "; and " + std::to_string(damaged - 1) + " more of " +
                        std::to_string(files_.size()) + " files";
    return report;
  }

 private:
  void journal(const std::string& file, const JournalContents& contents) {
    std::string says = std::to_string(contents.records) + " records";
    if (contents.torn > 0)
      says += "; the last " + std::to_string(contents.torn) +
              " bytes are of a record that was not acknowledged, or is being written";
    if (contents.never_begun) says = "never begun: open() removes it";
    found(file, contents.error, says);
  }
  // Throws Failure of what cannot be read, be it damaged or not.
  void found(const std::string& file, const std::optional<Error>& error, const std::string& says) {
    if (error && !is_damage(*error)) throw Failure(sentence(file, *error));
    Json one{{"file", printable(file)}, {"sound", !error}};
    if (error)
      one["error"] = describe(*error);
    else
      one["says"] = says;
    if (error && failure_.empty()) failure_ = sentence(file, *error);
    files_.push_back(std::move(one));
  }

  Json files_ = Json::array();
  std::string failure_;  // of the first
};

}  // namespace state_report

StateReport verify_state(const std::string& path) {
  using namespace state_report;
  Verification verification;
  if (!is_folder(path)) {
    StateContents state;
    if (is_journal(path))
      verification.one_journal(path, {});
    else
      verification.one_state(path, std::nullopt, state);
    return verification.report();
  }
  read_as_it_lies(path, [&](const StateFolder& folder) {
    verification.folder(folder);
    return verification.sound();
  });
  StateReport report = verification.report();
  if (!report.failure.empty())
    report.failure += "; personalize state repair " + path + " keeps what precedes the damage";
  return report;
}

void print_verified(const StateReport& report) {
  using namespace state_report;
  for (const Json& file : report.says["files"])
    std::printf("%s: %s\n", text(file["file"]).c_str(),
                file["sound"].get<bool>() ? ("sound, " + text(file["says"])).c_str()
                                          : ("DAMAGED: " + text(file["error"]["message"])).c_str());
}

}  // namespace personalize::tools
