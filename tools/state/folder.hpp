// A recommender's folder as it lies: its files, and what its journals say.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "personalize_runtime.hpp"

namespace personalize::tools {

// Names only. No lock is taken and nothing is changed.
struct StateFolder {
  std::string path;
  std::vector<std::uint64_t> states, journals;  // their numbers, ascending
  std::vector<std::string> others;              // sorted, without the lock

  std::string path_of(const std::string& name) const { return path + "/" + name; }
  std::string state(std::uint64_t number) const {
    return path_of(detail::Keeper::state_name(number));
  }
  std::string journal(std::uint64_t number) const {
    return path_of(detail::Keeper::journal_name(number));
  }
};

// Throws Failure where there is no such folder.
StateFolder list_state_folder(const std::string& path);

std::uint64_t file_bytes(const std::string& path);  // 0: there is none

// What the records of a journal say of users and items. What has no function here is of no use
// without a model.
struct RecordVisitor {
  virtual ~RecordVisitor() = default;
  virtual void event(const detail::EventChange&) {}
  virtual void merge(std::string_view /*session*/, std::string_view /*user*/) {}
  virtual void forget(std::string_view /*user*/, std::string_view /*session*/) {}
  virtual void import(const detail::Blob&) {}
  virtual void put(std::string_view /*item*/) {}
  virtual void remove(std::string_view /*item*/, bool /*there*/) {}
  virtual void update() {}   // looks at the items that wait
  virtual void publish() {}  // and they are in
  virtual void swap() {}     // another model looks at what there is
  // An item or event type that gets the next number by model() or opened().
  virtual void name(bool /*of_item*/, std::string_view) {}
  virtual void model() {}   // and is published
  virtual void opened() {}  // by a process for which these numbers follow the state's
};

// Decodes a record by the library's own fields. Errors: corrupt.
Result<void> read_record(std::uint32_t type, std::span<const std::byte> payload,
                         RecordVisitor& visitor);

struct JournalContents {
  std::uint64_t bytes = 0;
  bool never_begun = false;  // its process ended while it made the file
  detail::JournalHeader header;
  std::uint64_t records = 0, first = 0, last = 0;  // numbers; of no records 0
  std::map<std::uint32_t, std::uint64_t> by_type;
  std::uint64_t sound_bytes = 0;  // up to the end, or to what is damaged
  std::uint64_t next = 0;         // number of the record that would come next
  std::uint64_t torn = 0;         // bytes of a record that was not acknowledged
  bool closed = false;            // the last record says that the process ended in peace
  std::optional<Error> error;
};

// Reads all records. may_be_new: a header in part is none of a damaged file.
JournalContents read_journal_file(const std::string& path,
                                  const detail::JournalExpectation& expected, bool may_be_new,
                                  RecordVisitor& visitor);

std::string_view record_name(std::uint32_t type);  // "event"; empty: of a later version

// The present state of a folder and the journals behind it, in the order in which open() reads
// them. Ends where one is damaged or missing.
struct JournalChain {
  std::vector<std::pair<std::uint64_t, JournalContents>> journals;
  std::optional<Error> error;
  bool missing = false;  // what the error says of journal `broken`
  std::uint64_t broken = 0;
};
JournalChain read_journals(const StateFolder& folder, const detail::StateHead& head,
                           RecordVisitor& visitor);

// Runs what reads a folder that another process may have open: once more where it was not sound, or
// threw Failure, and a save has replaced files meanwhile.
void read_as_it_lies(const std::string& path,
                     const std::function<bool(const StateFolder&)>& attempt);

}  // namespace personalize::tools
