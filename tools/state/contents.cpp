#include "state/contents.hpp"

#include <array>
#include <limits>
#include <memory>
#include <string_view>
#include <utility>

namespace personalize::tools {
namespace state_contents {

using detail::FieldReader;

// The fields that lasting_fields() names, without a catalogue around them.
struct Lasting {
  std::uint32_t generation = 0, encoder_since = 0, space_since = 0;
  Calibration calibration;
  GammaPrior well_known_prior, cold_prior;
  std::int64_t started = 0, trained_until = no_timestamp;
  // Of all items, of which the last is kept.
  struct Statistics {
    ItemStatistics last;
    const ItemStatistics& operator[](std::size_t) const { return last; }
    ItemStatistics& edit(std::size_t) { return last; }
  } statistics;
  std::shared_ptr<const Vector<std::uint32_t>> active =
      std::make_shared<const Vector<std::uint32_t>>();
  std::shared_ptr<const Vector<double>> second_moment;
};

class Reader {
 public:
  Reader(StateContents& contents, const StateVisitor& visitor)
      : contents_(contents), visitor_(visitor) {}

  Result<void> visit(const SectionInfo& section, std::span<const std::byte> bytes) {
    const std::string_view tag(section.tag.data(), section.tag.size());
    FieldReader archive{bytes};
    const std::size_t place =
        static_cast<std::size_t>(std::find(tags.begin(), tags.end(), tag) - tags.begin());
    if (place == tags.size()) return {};  // of a later version
    const bool repeats = place >= first_that_repeats;
    if (place != seen_ && !(repeats && place + 1 == seen_))
      return Error{Errc::corrupt, "stands where another section is to be"};
    seen_ = place + 1;
    if (auto read = read_section(place, section, archive); !read) return read;
    if (!archive.at_end()) return Error{Errc::corrupt, "its values contradict one another"};
    return {};
  }

  Result<void> finish() const {
    if (seen_ == tags.size() && shards_ == detail::Users::shard_count) return {};
    return Error{Errc::corrupt,
                 "sections are missing: there is none behind " +
                     (seen_ == 0 ? std::string("the table") : std::string(tags[seen_ - 1]))};
  }

 private:
  static constexpr std::array<std::string_view, 11> tags{
      "HEAD", "ITEM", "TYPE", "FORG", "CATL", "CNTR", "PUTS", "EVID", "CTXT", "SLAT", "USER"};
  static constexpr std::size_t first_that_repeats = 8;

  Result<void> read_section(std::size_t place, const SectionInfo& section, FieldReader& archive) {
    detail::StateHead& head = contents_.head;
    const std::size_t items = contents_.items.size();
    switch (place) {
      case 0:
        detail::StateHead::each_field(archive, head);
        detail::TimeGate::each_field(archive, times_);
        if (head.state_size > most_floats || head.dimension > most_floats) archive.fail();
        return {};
      case 1:
        return detail::StateReader::read_names(archive, contents_.items);
      case 2:
        return detail::StateReader::read_names(archive, contents_.event_types);
      case 3: {
        StringTable names;
        auto read = detail::StateReader::read_names(archive, names);
        contents_.forgotten = names.size();
        return read;
      }
      case 4:
        detail::lasting_fields(archive, lasting_, items, std::numeric_limits<std::int64_t>::max());
        (void)archive.bytes(archive.left());
        return {};
      case 5:
        return read_counters(archive);
      case 6:
        read_put_items(archive);
        return {};
      case 7: {
        detail::EventIds ids(std::size_t{1} << 28);
        ids.read(archive);
        contents_.event_ids = ids.count();
        return {};
      }
      case 8: {
        if (section.index >= ContextSums::stripe_count || head.dimension == 0) {
          archive.fail();
          return {};
        }
        ContextSums sums(static_cast<std::size_t>(head.dimension),
                         detail::most_memory / (2 * ContextSums::stripe_count));
        sums.read_stripe(section.index, archive, items);
        sums.for_each(decay_.at(head.saved_at), [&](auto&&...) { ++contents_.contexts; });
        return {};
      }
      case 9:
        contents_.slates += SlateLog::count_written(archive);
        slates_.read_stripe(section.index, archive, items);
        return {};
      default:
        return read_users(section.index, archive);
    }
  }

  Result<void> read_counters(FieldReader& archive) {
    ItemCounters counters;
    ItemCounters::each_field(archive, counters);
    if (!archive.ok() || counters.size() > contents_.items.size()) {
      archive.fail();
      return {};
    }
    const DecayMoment moment = decay_.at(contents_.head.saved_at);
    for (std::uint32_t i = 0; i < counters.size(); ++i) {
      const auto value = [&](ItemCounters::Kind kind) { return counters.value(kind, i, moment); };
      const double interactions = value(ItemCounters::Kind::interactions),
                   positive = value(ItemCounters::Kind::positive),
                   expected = value(ItemCounters::Kind::expected);
      contents_.items_counted += interactions > 0 || positive > 0 || expected > 0;
      contents_.interactions += interactions;
      contents_.positive += positive;
      contents_.expected += expected;
    }
    return {};
  }

  void read_put_items(FieldReader& archive) {
    detail::PutItems put(contents_.head.key, std::numeric_limits<std::uint64_t>::max());
    put.read(archive);
    std::uint64_t version = 0;
    for (const auto& [id, item] : put.waiting(version, [](const auto&) {}))
      contents_.waiting.push_back({id, item.removed});
    put.each_with_events(
        [&](const std::string& id, std::size_t count) { contents_.waiting_events[id] = count; });
    for (const auto& [id, item] : put.taken_in([](const std::string&) { return false; }))
      ++(item.removed ? contents_.removed : contents_.known);
  }

  Result<void> read_users(std::size_t shard, FieldReader& archive) {
    if (shard != shards_ || shards_ >= detail::Users::shard_count) {
      archive.fail();
      return {};
    }
    if (shards_++ == 0 && visitor_.before_users) visitor_.before_users(contents_);
    const detail::StateHead& head = contents_.head;
    const detail::User::Bounds bounds{
        static_cast<std::size_t>(head.state_size),
        detail::User::offset_size(static_cast<std::size_t>(head.dimension)),
        contents_.items.size(),
        contents_.event_types.size(),
        65'535,
        lasting_.space_since};
    // Of one 64th at a time, with tables in proportion to what there is.
    const std::size_t budget = detail::Users::shard_count * ((8 * archive.left()) + 4096);
    detail::Users users(budget, detail::most_memory, bounds.state_size,
                        static_cast<std::size_t>(head.dimension));
    users.read_shard(shard, archive, head.key, bounds, lasting_.generation, lasting_.encoder_since);
    if (!archive.ok()) return {};
    users.for_each(shard, [&](const detail::User& user) {
      ++(user.key()[0] == 'u' ? contents_.users : contents_.sessions);
      contents_.with_state += user.generation >= lasting_.encoder_since && user.encoded;
      contents_.with_events += user.events() > 0;
      contents_.remembered_events += user.events();
    });
    if (visitor_.user)
      users.for_each(shard, [&](const detail::User& user) { visitor_.user(contents_, user); });
    return {};
  }

  static constexpr std::uint64_t most_floats = std::uint64_t{1} << 24;  // of a user

  StateContents& contents_;
  const StateVisitor& visitor_;
  const RecommenderOptions options_;
  detail::TimeGate times_{options_, no_timestamp};
  const Decay decay_{detail::Catalogue::half_life};
  Lasting lasting_;
  SlateLog slates_{16, 1, {}, std::size_t{1} << 22};
  std::size_t seen_ = 0, shards_ = 0;
};

}  // namespace state_contents

Result<void> read_state(detail::ByteSource& source, StateContents& contents,
                        const StateVisitor& visitor) {
  state_contents::Reader reader{contents, visitor};
  contents.bytes = source.size();
  LoadOptions options;
  options.limits.file_bytes = options.limits.raw_bytes = std::uint64_t{1} << 44;
  auto read =
      detail::read_each_section(source, detail::state_file, options,
                                [&](const SectionInfo& section, std::span<const std::byte> bytes) {
                                  return reader.visit(section, bytes);
                                });
  return read ? reader.finish() : read;
}

Result<void> read_state(const std::string& path, StateContents& contents,
                        const StateVisitor& visitor) {
  auto source = detail::ByteSource::open(path);
  if (!source) return source.error();
  auto read = read_state(*source, contents, visitor);
  if (read || read.error().code == Errc::io) return read;
  Error error = read.error();
  error.message = path + ": " + error.message;
  return error;
}

bool is_damage(const Error& error) {
  switch (error.code) {
    case Errc::format:
    case Errc::truncated:
    case Errc::checksum:
    case Errc::compression:
    case Errc::corrupt:
      return true;
    default:
      return false;
  }
}

}  // namespace personalize::tools
