#include "state/folder.hpp"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "command/command.hpp"
#include "state/contents.hpp"

namespace personalize::tools {
namespace state_folder {

using detail::FieldReader;
using detail::RecordOf;

bool is_id(std::string_view id) { return id.size() <= max_id_bytes && detail::valid_id(id); }

Error contradicts() { return {Errc::corrupt, "its values contradict one another"}; }

}  // namespace state_folder

StateFolder list_state_folder(const std::string& path) {
  StateFolder folder;
  folder.path = path;
  while (folder.path.size() > 1 && folder.path.ends_with('/')) folder.path.pop_back();
  std::error_code error;
  std::filesystem::directory_iterator entries(path, error);
  if (error) throw Failure(path + ": cannot open the folder: " + error.message());
  for (; entries != std::filesystem::directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().string();
    if (const auto state = detail::Keeper::number_of(name, "state-", ".pzs"))
      folder.states.push_back(*state);
    else if (const auto journal = detail::Keeper::number_of(name, "journal-", ".pzj"))
      folder.journals.push_back(*journal);
    else if (name != "lock")
      folder.others.push_back(name);
    if (error) break;
  }
  if (error) throw Failure(path + ": cannot list: " + error.message());
  std::sort(folder.states.begin(), folder.states.end());
  std::sort(folder.journals.begin(), folder.journals.end());
  std::sort(folder.others.begin(), folder.others.end());
  return folder;
}

std::uint64_t file_bytes(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? 0 : size;
}

std::string_view record_name(std::uint32_t type) {
  using detail::RecordOf;
  switch (static_cast<RecordOf>(type)) {
    case RecordOf::event:
      return "event";
    case RecordOf::slate:
      return "slate";
    case RecordOf::use:
      return "use";
    case RecordOf::merge:
      return "merge";
    case RecordOf::forget:
      return "forget";
    case RecordOf::put:
      return "put";
    case RecordOf::remove:
      return "remove";
    case RecordOf::update:
      return "update";
    case RecordOf::publish:
      return "publish";
    case RecordOf::swap:
      return "swap";
    case RecordOf::model:
      return "model";
    case RecordOf::encode:
      return "encode";
    case RecordOf::import:
      return "import";
    case RecordOf::arrived:
      return "arrived";
    case RecordOf::close:
      return "close";
    case RecordOf::names:
      return "names";
    case RecordOf::opened:
      return "opened";
  }
  return "";
}

Result<void> read_record(std::uint32_t type, std::span<const std::byte> payload,
                         RecordVisitor& visitor) {
  using namespace state_folder;
  FieldReader archive{payload};
  std::string_view first, second;
  const auto users = [&] {
    return archive.at_end() && is_id(first) && is_id(second) && !(first.empty() && second.empty());
  };
  switch (static_cast<RecordOf>(type)) {
    case RecordOf::event:
    case RecordOf::arrived: {
      detail::EventChange change;
      detail::EventChange::each_field(archive, change);
      if (!archive.ok() || !is_id(change.user) || !is_id(change.session) ||
          (change.user.empty() && change.session.empty()) || !is_id(change.waits_for))
        return contradicts();
      visitor.event(change);
      return {};
    }
    case RecordOf::slate: {
      detail::SlateChange change;
      detail::SlateChange::each_field(archive, change);
      return archive.ok() ? Result<void>{} : contradicts();
    }
    case RecordOf::merge:
      archive(first, second);
      if (!users() || first.empty() || second.empty()) return contradicts();
      visitor.merge(first, second);
      return {};
    case RecordOf::forget:
      archive(first, second);
      if (!users()) return contradicts();
      visitor.forget(first, second);
      return {};
    case RecordOf::put:
      archive(first);
      if (!archive.ok() || first.empty() || !is_id(first)) return contradicts();
      visitor.put(first);
      return {};
    case RecordOf::remove: {
      bool there = false;
      archive(first, there);
      if (!archive.at_end() || first.empty() || !is_id(first)) return contradicts();
      visitor.remove(first, there);
      return {};
    }
    case RecordOf::update:
      visitor.update();
      return {};
    case RecordOf::publish:
      visitor.publish();
      return {};
    case RecordOf::swap:
      visitor.swap();
      return {};
    case RecordOf::names: {
      bool of_items = false;
      std::uint64_t count = 0;
      archive(of_items, count);
      for (std::uint64_t n = 0; n < count && archive.ok(); ++n) {
        archive(first);
        if (!archive.ok() || first.empty() || !is_id(first)) return contradicts();
        visitor.name(of_items, first);
      }
      return archive.at_end() ? Result<void>{} : contradicts();
    }
    case RecordOf::model:
      visitor.model();
      return {};
    case RecordOf::opened:
      visitor.opened();
      return {};
    case RecordOf::import: {
      const auto blob = detail::Blob::read(payload);
      if (!blob) return blob.error();
      visitor.import(*blob);
      return {};
    }
    case RecordOf::use:
    case RecordOf::encode:
    case RecordOf::close:
      return {};
  }
  return {};  // of a later version
}

JournalContents read_journal_file(const std::string& path,
                                  const detail::JournalExpectation& expected, bool may_be_new,
                                  RecordVisitor& visitor) {
  JournalContents contents;
  contents.bytes = file_bytes(path);
  std::uint64_t offset = detail::journal_header_size;
  contents.next = expected.first_record.value_or(0);
  const auto read = detail::read_journal(
      path, expected,
      [&](std::uint64_t sequence, std::uint32_t type,
          std::span<const std::byte> payload) -> Result<void> {
        if (auto record = read_record(type, payload, visitor); !record)
          return Error{record.error().code,
                       path + ": record " + std::to_string(sequence) + " at byte " +
                           std::to_string(offset) + ": " + record.error().message,
                       offset};
        if (contents.records++ == 0) contents.first = sequence;
        contents.last = sequence;
        contents.next = sequence + 1;
        ++contents.by_type[type];
        contents.closed = static_cast<detail::RecordOf>(type) == detail::RecordOf::close;
        offset += detail::record_frame_size + payload.size();
        return {};
      });
  contents.sound_bytes = offset;
  if (!read) {
    contents.never_begun = may_be_new && read.error().code == Errc::truncated;
    if (!contents.never_begun) contents.error = read.error();
    if (const auto header = detail::peek_journal_header(path, expected))
      contents.header = *header;
    else
      contents.sound_bytes = 0;
    return contents;
  }
  contents.header = read->header;
  contents.torn = read->torn;
  contents.next = read->next_sequence;
  return contents;
}

JournalChain read_journals(const StateFolder& folder, const detail::StateHead& head,
                           RecordVisitor& visitor) {
  JournalChain chain;
  std::vector<std::uint64_t> numbers;
  for (const std::uint64_t number : folder.journals)
    if (number >= head.number) numbers.push_back(number);
  std::uint64_t next = head.next_sequence;
  for (std::size_t j = 0; j < std::max<std::size_t>(numbers.size(), 1); ++j) {
    const std::uint64_t number = head.number + j;
    if (j >= numbers.size() || numbers[j] != number) {
      chain.missing = true;
      chain.broken = number;
      chain.error = Error{Errc::truncated, folder.journal(number) +
                                               ": is missing, and with it what came after the "
                                               "state"};
      return chain;
    }
    auto contents = read_journal_file(
        folder.journal(number), {.lineage = head.lineage, .number = number, .first_record = next},
        j > 0, visitor);
    next = contents.next;
    chain.error = contents.error;
    chain.broken = number;
    chain.journals.emplace_back(number, std::move(contents));
    if (chain.error) return chain;
  }
  return chain;
}

void read_as_it_lies(const std::string& path,
                     const std::function<bool(const StateFolder&)>& attempt) {
  constexpr int tries = 10;
  for (int t = 1;; ++t) {
    const StateFolder folder = list_state_folder(path);
    const auto changed = [&] {
      const StateFolder now = list_state_folder(path);
      return t < tries && (now.states != folder.states || now.journals != folder.journals);
    };
    try {
      if (attempt(folder) || !changed()) return;
    } catch (const Failure&) {
      if (!changed()) throw;
    }
  }
}

}  // namespace personalize::tools
