#include "state/repair.hpp"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "state/contents.hpp"
#include "state/folder.hpp"

namespace personalize::tools {
namespace state_repair {

struct Plan {
  struct Step {
    std::string says;
    std::function<void()> take;
  };
  std::vector<Step> steps;
  std::uint64_t lost_bytes = 0, lost_records = 0;
};

void require(const Result<void>& done) {
  if (!done) throw Failure(done.error().message);
}

// NAME.damaged, or NAME.damaged-2 and so on where that is there.
std::string aside(const std::string& path) {
  std::error_code error;
  std::string name = path + ".damaged";
  for (int n = 2; std::filesystem::exists(std::filesystem::symlink_status(name, error)); ++n)
    name = path + ".damaged-" + std::to_string(n);
  return name;
}

std::string last_part(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Bytes [begin, end) of a file.
void append_part(const std::string& path, std::uint64_t begin, std::uint64_t end,
                 detail::FileSink& to) {
  auto source = detail::ByteSource::open(path);
  if (!source) throw Failure(source.error().message);
  detail::BareVector<std::byte> buffer;
  constexpr std::uint64_t piece = std::uint64_t{1} << 20;
  for (std::uint64_t at = 0; at < std::min(end, source->size());) {
    const std::uint64_t stop = at < begin ? begin : end;
    const auto size = static_cast<std::size_t>(std::min(piece, stop - at));
    const auto bytes = source->take(size, buffer, size);
    if (!bytes) throw Failure(bytes.error().message);
    if (at >= begin) to.append(*bytes);
    at += size;
  }
}

void copy_file(const std::string& from, const std::string& to) {
  detail::FileSink sink{to, 0600};
  append_part(from, 0, file_bytes(from), sink);
  require(sink.commit());
}

void add_move(Plan& plan, const std::string& path, const std::string& why) {
  plan.steps.push_back(
      {last_part(path) + ": moved to " + last_part(aside(path)) + ": " + why, [path] {
         std::error_code error;
         std::filesystem::rename(path, aside(path), error);
         if (error) throw Failure(path + ": cannot move: " + error.message());
       }});
}

// How far a journal's records are sound, whatever its header says; and what whole records lie
// behind, as far as looking for them is reasonable.
struct Sound {
  std::uint64_t end = detail::journal_header_size, records = 0, next = 0, records_behind = 0;
};
Sound sound_part(const std::string& path, std::uint64_t seed, std::uint64_t next) {
  Sound sound;
  sound.next = next;
  auto reader = detail::JournalReader::open(path);
  if (!reader) throw Failure(reader.error().message);
  const std::uint64_t size = reader->size();
  if (size <= sound.end) {
    sound.end = size;
    return sound;
  }
  // A reader begins at the front.
  if (const auto header = reader->at(0, detail::journal_header_size); !header)
    throw Failure(header.error().message);
  const auto entry = [&](std::uint64_t offset) {
    const auto found = reader->entry(offset, seed);
    if (!found) throw Failure(found.error().message);
    return *found;
  };
  RecordVisitor nothing;
  for (auto found = entry(sound.end); found && found->sequence == sound.next;
       found = sound.end < size ? entry(sound.end) : std::nullopt) {
    if (!read_record(found->type, found->payload, nothing)) break;
    sound.end += detail::record_frame_size + found->payload.size();
    ++sound.next;
    ++sound.records;
  }
  // Made files can hold much that looks like a record.
  std::uint64_t budget = 4 * size + (std::uint64_t{1} << 28);
  for (std::uint64_t at = sound.end; at + detail::record_frame_size <= size;) {
    const auto head = reader->at(at, detail::record_head_size);
    if (!head) throw Failure(head.error().message);
    const auto payload = detail::load_integer<std::uint32_t>(head->data());
    const auto ahead = detail::load_integer<std::uint64_t>(head->data() + 8) - sound.next;
    if (payload <= detail::most_payload && ahead <= (at - sound.end) / detail::record_frame_size) {
      if (payload + detail::record_frame_size > budget) break;
      budget -= payload + detail::record_frame_size;
      if (const auto found = entry(at)) {
        ++sound.records_behind;
        at += detail::record_frame_size + found->payload.size();
        continue;
      }
    }
    ++at;
  }
  return sound;
}

// The journal with a header of its own and its sound part; what it was stays beside it.
void add_cut(Plan& plan, const std::string& path, const detail::JournalHeader& header,
             const Sound& sound) {
  const std::uint64_t size = file_bytes(path);
  const std::uint64_t lost = size - sound.end;
  plan.lost_bytes += lost;
  plan.lost_records += sound.records_behind;
  const bool cut = size > detail::journal_header_size;
  plan.steps.push_back(
      {last_part(path) + ": copied to " + last_part(aside(path)) + "; " +
           (lost > 0 ? "cut at byte " + std::to_string(sound.end) + " of " + std::to_string(size)
                     : std::string("its header made anew")) +
           ", behind " + std::to_string(sound.records) + " sound records",
       [path, header, end = sound.end, cut] {
         copy_file(path, aside(path));
         detail::FileSink sink{path, 0600};
         sink.append(detail::journal_header_bytes(header));
         if (cut) append_part(path, detail::journal_header_size, end, sink);
         require(sink.commit());
       }});
}

void add_empty_journal(Plan& plan, const std::string& path, const detail::JournalHeader& header,
                       const std::string& why) {
  plan.steps.push_back({last_part(path) + ": made without records: " + why, [path, header] {
                          detail::FileSink sink{path, 0600};
                          sink.append(detail::journal_header_bytes(header));
                          require(sink.commit());
                        }});
}

detail::JournalHeader header_for(const detail::StateHead& head, std::uint64_t number,
                                 std::uint64_t first, const std::array<std::uint64_t, 2>& model) {
  detail::JournalHeader header;
  header.lineage = head.lineage;
  header.number = number;
  header.first_sequence = first;
  header.model = model;
  return header;
}

std::string advice(const std::string& folder) {
  return "; a state file cannot be repaired. With a copy that save(path) made: personalize state "
         "repair " +
         folder + " --from COPY.pzs";
}

// Throws Failure unless the error says that the file is damaged.
void require_damage(const Error& error) {
  if (!is_damage(error)) throw Failure(error.message);
}

// The latest sound state, and what lies behind it that is not.
Plan plan_for(const StateFolder& folder) {
  Plan plan;
  if (folder.states.empty())
    throw Failure(folder.path + ": holds no state file" + advice(folder.path));
  StateContents state;
  std::optional<Error> first_error;
  std::size_t s = folder.states.size();
  while (s-- > 0) {
    state = {};
    const std::string path = folder.state(folder.states[s]);
    auto read = read_state(path, state);
    if (read && state.head.number != folder.states[s])
      read = Error{Errc::corrupt, path + ": is not the file that it is named after"};
    if (read) break;
    require_damage(read.error());
    if (!first_error) first_error = read.error();
    if (s == 0) throw Failure(first_error->message + advice(folder.path));
  }
  for (std::size_t later = s + 1; later < folder.states.size(); ++later)
    add_move(plan, folder.state(folder.states[later]),
             "damaged; state " + std::to_string(folder.states[s]) +
                 " and the journals behind it hold what there is");

  const std::uint64_t first = folder.states[s];
  std::uint64_t behind = first;  // journals from this one on lie behind damage
  RecordVisitor nothing;
  const JournalChain chain = read_journals(folder, state.head, nothing);
  if (!chain.error) return plan;
  require_damage(*chain.error);
  std::uint64_t next = state.head.next_sequence;
  std::array<std::uint64_t, 2> model{state.head.model.encoder, state.head.model.items};
  for (const auto& [number, journal] : chain.journals)
    if (number != chain.broken) {
      next = journal.next;
      if (!journal.never_begun) model = journal.header.model;
    }
  const std::string path = folder.journal(chain.broken);
  if (!chain.missing) {
    const auto header = header_for(state.head, chain.broken, next, model);
    const Sound sound = sound_part(path, header.seed(), next);
    const auto was =
        detail::peek_journal_header(path, {.lineage = header.lineage, .number = chain.broken});
    const bool whole = sound.end == file_bytes(path);
    if (sound.records > 0 || chain.broken == first || whole) {
      add_cut(plan, path, was ? *was : header, sound);
      behind = chain.broken + 1;
      if (whole) {  // but for its header: what lies behind it follows
        if (behind <= folder.journals.back())
          plan.steps.back().says += "; verify then looks at the journals behind it";
        return plan;
      }
    } else {
      behind = chain.broken;
      plan.lost_records += sound.records_behind;
    }
  } else if (chain.broken == first) {
    add_empty_journal(plan, path, header_for(state.head, first, next, model),
                      "it is missing, and with it what came after the state");
    behind = first + 1;
  } else {
    behind = chain.broken;
  }
  for (const std::uint64_t number : folder.journals)
    if (number >= behind) {
      const std::string later = folder.journal(number);
      const JournalContents contents = read_journal_file(later, {}, true, nothing);
      plan.lost_bytes += contents.bytes;
      plan.lost_records += contents.records;
      add_move(plan, later,
               number == chain.broken && !chain.missing
                   ? "it holds no sound record that follows"
                   : "it lies behind what is damaged or missing");
    }
  // What is furthest behind goes first, so that a repair that is cut short leaves a folder that can
  // be repaired.
  std::reverse(plan.steps.begin(), plan.steps.end());
  return plan;
}

// All that is there moves aside, and the copy takes its place.
Plan plan_from(const StateFolder& folder, const std::string& from) {
  Plan plan;
  StateContents state;
  if (const auto read = read_state(from, state); !read) throw Failure(read.error().message);
  std::error_code error;
  for (const std::uint64_t number : folder.states)
    if (std::filesystem::equivalent(folder.state(number), from, error))
      throw Failure(from + ": is of this folder; --from takes a copy that lies elsewhere");
  for (const std::uint64_t number : folder.journals) {
    plan.lost_bytes += file_bytes(folder.journal(number));
    add_move(plan, folder.journal(number), "the copy takes the folder's place");
  }
  for (const std::uint64_t number : folder.states)
    add_move(plan, folder.state(number), "the copy takes the folder's place");
  const detail::StateHead head = state.head;
  add_empty_journal(
      plan, folder.journal(head.number),
      header_for(head, head.number, head.next_sequence, {head.model.encoder, head.model.items}),
      "what comes after the copy goes there");
  const std::string to = folder.state(head.number);
  plan.steps.push_back(
      {last_part(to) + ": copied from " + from, [from, to] { copy_file(from, to); }});
  return plan;
}

}  // namespace state_repair

StateRepaired repair_state(const StateRepair& options) {
  using namespace state_repair;
  StateFolder folder = list_state_folder(options.folder);
  std::error_code error;
  // A dry run makes no lock; where there is none, nobody holds it.
  std::optional<detail::Folder> held;
  if (!options.dry_run || std::filesystem::exists(folder.path_of("lock"), error)) {
    auto opened = detail::Folder::open(folder.path);
    if (!opened) throw Failure(opened.error().message);
    held.emplace(std::move(*opened));
    folder = list_state_folder(options.folder);
  }
  Plan plan = options.from.empty() ? plan_for(folder) : plan_from(folder, options.from);
  if (!options.dry_run)
    for (const Plan::Step& step : plan.steps) step.take();
  if (held && !options.dry_run) require(held->sync());
  StateRepaired repaired{{}, plan.lost_bytes, plan.lost_records};
  for (const Plan::Step& step : plan.steps) repaired.steps.push_back(step.says);
  return repaired;
}

}  // namespace personalize::tools
