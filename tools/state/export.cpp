#include "state/export.hpp"

#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "command/command.hpp"
#include "command/output.hpp"
#include "state/contents.hpp"
#include "state/folder.hpp"

namespace personalize::tools {
namespace state_export {

struct Event {
  std::uint32_t item, event_type;
  std::int64_t timestamp;
};

// Names in the order in which they come: those of the state by its numbers, then others.
class Names {
 public:
  void begin(const StringTable& names) {
    for (std::size_t i = 0; i < names.size(); ++i) add(names[i]);
  }
  std::uint32_t add(std::string_view name) {
    const auto [at, added] =
        numbers_.emplace(std::string(name), static_cast<std::uint32_t>(names_.size()));
    if (added) names_.push_back(&at->first);
    return at->second;
  }
  std::size_t size() const { return names_.size(); }
  const std::string& operator[](std::size_t number) const { return *names_[number]; }

 private:
  std::unordered_map<std::string, std::uint32_t> numbers_;
  std::vector<const std::string*> names_;
};

// What journals say of users, on top of what the state says of them. Keys as UserKey has them.
class JournalUsers final : public RecordVisitor {
 public:
  explicit JournalUsers(const StateContents& state) {
    items_.begin(state.items);
    types_.begin(state.event_types);
    items_of_state_ = items_.size();
    types_of_state_ = types_.size();
    begin_numbers();
    waiting_events_ = state.waiting_events;
    for (const auto& item : state.waiting)
      waiting_.push_back({item.item, item.removed, version_++});
  }

  void event(const detail::EventChange& change) override {
    if (!change.waits_for.empty()) {
      std::uint64_t& wait = waiting_events_[std::string(change.waits_for)];
      if (!change.arrived)
        ++wait;
      else if (wait > 0)
        --wait;
    }
    if (change.item == detail::EventChange::no_item) return;
    if (change.item >= by_number_.size()) {
      ++unknown_items;
      return;
    }
    History& history = of(key(change.user, change.session));
    if (history.parts.empty() || history.parts.back().of_state) history.parts.emplace_back();
    history.parts.back().events.push_back({by_number_[change.item],
                                           change.event_type < types_by_number_.size()
                                               ? types_by_number_[change.event_type]
                                               : no_event_type,
                                           change.time.timestamp});
  }
  // The session's events come behind the user's, and the session ends.
  void merge(std::string_view session, std::string_view user) override {
    std::vector<Part> moved = std::exchange(of(key({}, session)).parts, {});
    History& to = of(key(user, {}));
    for (Part& part : moved) to.parts.push_back(std::move(part));
  }
  void forget(std::string_view user, std::string_view session) override {
    of(key(user, session)).parts.clear();
  }
  void import(const detail::Blob& blob) override {
    Part part;
    blob.for_each_event([&](std::string_view item, std::string_view type, std::int64_t timestamp) {
      part.events.push_back(
          {items_.add(item), type.empty() ? no_event_type : types_.add(type), timestamp});
    });
    History& history = of(std::string(blob.key()));
    history.parts.clear();
    history.parts.push_back(std::move(part));
  }
  // Items get numbers as they come in, in the order in which they were put.
  void put(std::string_view item) override { wait(item, false); }
  void remove(std::string_view item, bool) override { wait(item, true); }
  void update() override { looked_at_ = waiting_; }
  void publish() override {
    for (const Waiting& one : looked_at_) {
      if (one.removed)
        waiting_events_.erase(one.item);
      else
        give_number(items_.add(one.item));
      std::erase_if(waiting_, [&](const Waiting& w) { return w.version == one.version; });
    }
    looked_at_.clear();
  }
  void swap() override {
    coming_.clear();
    looked_at_.clear();
  }
  void name(bool of_item, std::string_view name) override {
    coming_.emplace_back(of_item, std::string(name));
  }
  void model() override {
    for (const auto& [of_item, name] : coming_)
      if (of_item)
        give_number(items_.add(name));
      else
        types_by_number_.push_back(types_.add(name));
    coming_.clear();
  }
  void opened() override {
    begin_numbers();
    looked_at_.clear();
    model();
  }

  // The state's events of a key that the journals name go to keep(); true: they do.
  bool keep(std::string_view key_text, const detail::User& user) {
    const std::string key_of(key_text);
    const bool named = histories_.contains(key_of);
    if (const auto wanted = of_state_.find(key_of); wanted != of_state_.end())
      user.for_each_event([&](const detail::RememberedEvent& e) {
        wanted->second.push_back({e.item, e.event_type, e.timestamp});
      });
    return named;
  }
  // Once, when all journals are read: whose events of the state are asked for.
  void end() {
    for (const auto& [_, history] : histories_)
      for (const Part& part : history.parts)
        if (part.of_state) of_state_[*part.of_state];
  }
  // write(key, events) for each key that the journals name.
  template <class Write>
  void each(Write write) {
    std::vector<Event> events_of;
    for (const auto& [name, history] : histories_) {
      events_of.clear();
      for (const Part& part : history.parts) {
        const std::vector<Event>& more = part.of_state ? of_state_[*part.of_state] : part.events;
        events_of.insert(events_of.end(), more.begin(), more.end());
      }
      if (!events_of.empty()) write(name, events_of);
    }
  }

  // On items that were put and that no update has taken in.
  std::uint64_t waiting_events() const {
    std::uint64_t sum = 0;
    for (const auto& [_, count] : waiting_events_) sum += count;
    return sum;
  }

  const std::string& item(std::uint32_t number) const { return items_[number]; }
  std::string_view event_type(std::uint32_t number) const {
    return number < types_.size() ? std::string_view(types_[number]) : std::string_view{};
  }

  std::uint64_t unknown_items = 0;  // on items that only a model could name

 private:
  struct Part {
    std::optional<std::string> of_state;  // all that the state has of this key
    std::vector<Event> events;
  };
  struct History {
    std::vector<Part> parts;
  };
  struct Waiting {
    std::string item;
    bool removed;
    std::uint64_t version;
  };

  static std::string key(std::string_view user, std::string_view session) {
    return user.empty() ? "s" + std::string(session) : "u" + std::string(user);
  }
  History& of(std::string name) {
    const auto [at, added] = histories_.try_emplace(std::move(name));
    if (added) {
      at->second.parts.emplace_back();
      at->second.parts.back().of_state = at->first;
    }
    return at->second;
  }
  void wait(std::string_view item, bool removed) {
    std::erase_if(waiting_, [&](const Waiting& w) { return w.item == item; });
    waiting_.push_back({std::string(item), removed, version_++});
  }
  // Those of the state.
  void begin_numbers() {
    by_number_.clear();
    numbered_.clear();
    types_by_number_.clear();
    for (std::size_t i = 0; i < items_of_state_; ++i) give_number(static_cast<std::uint32_t>(i));
    for (std::size_t t = 0; t < types_of_state_; ++t)
      types_by_number_.push_back(static_cast<std::uint32_t>(t));
  }
  // The next one, unless the item has one.
  void give_number(std::uint32_t item) {
    if (numbered_.size() <= item) numbered_.resize(item + std::size_t{1});
    if (numbered_[item]) return;
    numbered_[item] = true;
    by_number_.push_back(item);
  }

  Names items_, types_;
  std::vector<std::uint32_t> by_number_, types_by_number_;
  std::vector<bool> numbered_;  // whether an item is among them
  std::size_t items_of_state_ = 0, types_of_state_ = 0;
  std::vector<std::pair<bool, std::string>> coming_;  // whether it is an item, and its name
  std::vector<Waiting> waiting_, looked_at_;
  std::unordered_map<std::string, std::uint64_t> waiting_events_;  // by item
  std::uint64_t version_ = 0;
  std::unordered_map<std::string, History> histories_;
  std::unordered_map<std::string, std::vector<Event>> of_state_;
};

class Writer {
 public:
  Writer(const StateExport& options, OutputFile& out) : options_(options), out_(out) {}

  // Where the state knows no event types, there is no column of them.
  void begin(const StateContents& state) {
    typed_ = !state.event_types.empty();
    if (options_.format == EventFormat::csv)
      out_.append(typed_ ? "USER_ID,ITEM_ID,EVENT_TYPE,TIMESTAMP\n"
                         : "USER_ID,ITEM_ID,TIMESTAMP\n");
  }
  void write(const JournalUsers& names, std::string_view key, const std::vector<Event>& of) {
    const std::string_view id = key.substr(1);
    const bool is_user = key[0] == 'u';
    if (options_.format == EventFormat::csv && !is_user && !options_.session_prefix) {
      ++left_out;
      return;
    }
    ++(is_user ? users : sessions);
    events += of.size();
    lines_.clear();
    if (options_.format == EventFormat::jsonl)
      write_json(names, is_user ? "user" : "session", id, of);
    else
      write_csv(names, is_user ? std::string(id) : *options_.session_prefix + std::string(id), of);
    out_.append(lines_);
  }

  std::uint64_t users = 0, sessions = 0, events = 0, left_out = 0;

 private:
  void write_json(const JournalUsers& names, const char* kind, std::string_view id,
                  const std::vector<Event>& of) {
    nlohmann::ordered_json line{{kind, id}, {"events", nlohmann::ordered_json::array()}};
    for (const Event& event : of) {
      nlohmann::ordered_json one{{"item", names.item(event.item)}};
      if (const auto type = names.event_type(event.event_type); !type.empty())
        one["event_type"] = type;
      one["timestamp"] = event.timestamp;
      line["events"].push_back(std::move(one));
    }
    lines_ = line.dump() + '\n';
  }
  void write_csv(const JournalUsers& names, const std::string& id, const std::vector<Event>& of) {
    for (const Event& event : of) {
      detail::append_csv_field(id, lines_);
      lines_ += ',';
      detail::append_csv_field(names.item(event.item), lines_);
      lines_ += ',';
      if (typed_) {
        const std::string_view type = names.event_type(event.event_type);
        detail::append_csv_field(type.empty() ? options_.unknown_type : type, lines_);
        lines_ += ',';
      }
      lines_ += std::to_string(event.timestamp) + '\n';
    }
  }

  const StateExport& options_;
  OutputFile& out_;
  bool typed_ = true;
  std::string lines_;
};

// Of a folder: null of a state file alone. Throws Failure; nothing is written before the journals
// are read.
std::vector<std::string> export_from(const std::string& state_path, const StateFolder* folder,
                                     const StateExport& options, OutputFile& out, bool& begun) {
  std::optional<JournalUsers> after;
  Writer writer{options, out};
  std::vector<Event> events;
  StateContents state;
  const StateVisitor visitor{
      .before_users =
          [&](const StateContents& of) {
            after.emplace(of);
            if (folder) {
              const JournalChain chain = read_journals(*folder, of.head, *after);
              if (chain.error)
                throw Failure(chain.error->message + "; personalize state repair " + folder->path +
                              " keeps what precedes the damage");
            }
            after->end();
            begun = true;
            writer.begin(of);
          },
      .user =
          [&](const StateContents&, const detail::User& user) {
            if (user.events() == 0 || after->keep(user.key(), user)) return;
            events.clear();
            user.for_each_event([&](const detail::RememberedEvent& e) {
              events.push_back({e.item, e.event_type, e.timestamp});
            });
            writer.write(*after, user.key(), events);
          }};
  if (const auto read = read_state(state_path, state, visitor); !read)
    throw Failure(read.error().message);
  after->each(
      [&](std::string_view key, const std::vector<Event>& of) { writer.write(*after, key, of); });
  out.commit();
  std::vector<std::string> says{std::to_string(writer.events) + " events of " +
                                std::to_string(writer.users) + " users and " +
                                std::to_string(writer.sessions) + " sessions"};
  if (writer.left_out > 0)
    says[0] += "; " + std::to_string(writer.left_out) +
               " sessions were left out (--session-prefix takes them along)";
  if (const std::uint64_t waiting = after->waiting_events(); waiting > 0)
    says.push_back("warning: " + std::to_string(waiting) +
                   " events were left out: they are on items that were put and wait for an update");
  if (after->unknown_items > 0)
    says.push_back("warning: " + std::to_string(after->unknown_items) +
                   " events of the journal were left out: it does not say which items they are on");
  return says;
}

}  // namespace state_export

std::vector<std::string> export_state(const StateExport& options) {
  using namespace state_export;
  std::error_code error;
  OutputFile out(options.output);
  bool begun = false;
  if (!std::filesystem::is_directory(options.path, error))
    return export_from(options.path, nullptr, options, out, begun);
  std::vector<std::string> says;
  std::exception_ptr failed;  // when a part was written, which is not begun anew
  read_as_it_lies(options.path, [&](const StateFolder& folder) {
    if (folder.states.empty())
      throw Failure(folder.path + ": holds no state file (state-NNNNNNNNNNNN.pzs)");
    try {
      says = export_from(folder.state(folder.states.back()), &folder, options, out, begun);
    } catch (const Failure&) {
      if (!begun) throw;
      failed = std::current_exception();
    }
    return true;
  });
  if (failed) std::rethrow_exception(failed);
  return says;
}

}  // namespace personalize::tools
