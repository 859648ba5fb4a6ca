// A byte string as calls of a Recommender with hostile ids, times, lists and counts. Every call is
// made on two recommenders that were created alike: both must give the same answers, and keep every
// promise. Nothing in it depends on the system's clock or on a thread.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../small_model.hpp"
#include "promises.hpp"

namespace pz = personalize;
using promises::require;

namespace {

constexpr std::int64_t start = 1'700'000'000, hour = 3600;

// Reads numbers from the front; zeros once the bytes have ended.
class Input {
 public:
  explicit Input(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  bool ended() const { return bytes_.empty(); }
  std::uint32_t below(std::size_t n) { return static_cast<std::uint32_t>(byte() % n); }
  bool one_in(std::size_t n) { return below(n) == 1; }
  std::uint8_t byte() {
    if (bytes_.empty()) return 0;
    const std::uint8_t value = bytes_[0];
    bytes_ = bytes_.subspan(1);
    return value;
  }
  std::uint64_t word() {
    std::uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

std::shared_ptr<const pz::Model> make_model(bool rich) {
  pz::ModelParts p = small_model::parts({.items = rich ? 40u : 3u,
                                         .dimension = rich ? 12u : 2u,
                                         .hidden = rich ? 8u : 2u,
                                         .event_types = rich,
                                         .time_gaps = rich,
                                         .fields = rich});
  for (std::size_t i = 0; i < p.statistics.size(); ++i)
    p.statistics[i] = {i % 2 == 0 ? 0 : 100 - i, start - 1000, start,
                       start - 86'400 * static_cast<std::int64_t>(i)};
  auto model = pz::Model::from_parts(rich ? small_model::quantised(std::move(p)) : std::move(p));
  require(model.has_value(), "the fuzzer's own model is right");
  return *model;
}

// Ids that somebody may send.
std::string_view hostile_id(Input& in) {
  static const std::string long_id(256, 'x'), too_long(257, 'x');
  const std::array<std::string_view, 12> ids{
      "",         long_id,      too_long, std::string_view("a\0b", 3),
      "\xff\xfe", "a\"b,c\r\n", "=cmd()", "u0",
      "\xc3\xa9", " ",          "i0",     "00000000000000000000000000000001"};
  return ids[in.below(ids.size())];
}

std::string_view user_id(Input& in) {
  constexpr std::array<std::string_view, 6> users{"u0", "u1", "u2", "u3", "u4", ""};
  return in.one_in(16) ? hostile_id(in) : users[in.below(users.size())];
}

std::int64_t time_of(Input& in) {
  if (!in.one_in(8)) return start + hour * static_cast<std::int64_t>(in.byte());
  constexpr std::array<std::int64_t, 9> times{std::numeric_limits<std::int64_t>::min(),
                                              std::numeric_limits<std::int64_t>::min() + 1,
                                              -1,
                                              0,
                                              1,
                                              start * 1000,
                                              4'102'444'800,
                                              std::numeric_limits<std::int64_t>::max() - 1,
                                              std::numeric_limits<std::int64_t>::max()};
  return in.one_in(4) ? static_cast<std::int64_t>(in.word()) : times[in.below(times.size())];
}

// now: what the recommender's clock says.
pz::RecommenderOptions options_of(Input& in, const std::int64_t& now) {
  pz::RecommenderOptions options;
  options.clock = [&now] { return now; };
  options.user_bytes = std::uint64_t{1} << (16 + in.below(4));
  options.slate_log_bytes = std::uint64_t{1} << (16 + in.below(4));
  options.context_bytes = std::uint64_t{1} << (16 + in.below(4));
  options.pending_bytes = std::uint64_t{1} << (12 + in.below(4));
  options.remembered_event_ids = 64;
  options.updates = in.one_in(2) ? pz::Updates::in_requests : pz::Updates::by_caller;
  options.history_length = 1 + in.below(6);
  options.max_users = 64;
  options.exploration_weight = static_cast<float>(in.below(5)) / 4;
  options.exploration_item_age_cut_off = std::chrono::hours{1 + 24 * in.below(60)};
  options.feedback = !in.one_in(8);
  if (in.one_in(4)) options.positive_event_types = {"click", "no such type"};
  if (in.one_in(4)) options.examination = {1.0f, 1e-30f, 0.5f};
  options.update_interval = std::chrono::hours{in.below(4)};
  options.remembered_slates = 1 + in.below(8);
  options.slate_expiry = std::chrono::hours{1 + in.below(48)};
  options.seed = in.byte();
  options.recommendation_key = {{1, 2}};
  options.gate_lookup = in.one_in(2);
  options.log = [](const pz::LogEntry& entry) {
    std::string line;
    pz::append_csv(entry, line);
    require(!line.empty() && line.back() == '\n', "an entry of the log is a line");
    require(entry.choice.propensity > 0 && entry.choice.propensity <= 1,
            "propensities are in (0, 1]");
  };
  return options;
}

bool same(const pz::Slate& a, const pz::Slate& b) {
  return a.id == b.id && a.propensity == b.propensity &&
         std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(),
                    [](const pz::Pick& x, const pz::Pick& y) {
                      return x.item == y.item && x.score == y.score && x.reason == y.reason &&
                             x.propensity == y.propensity;
                    });
}

// The same answer or the same error.
template <class T>
bool agree(const pz::Result<T>& a, const pz::Result<T>& b) {
  if (a.has_value() != b.has_value()) return false;
  return a ? *a == *b : a.error().code == b.error().code;
}
bool agree(const pz::Result<void>& a, const pz::Result<void>& b) {
  return a.has_value() == b.has_value() && (a || a.error().code == b.error().code);
}

class Service {
 public:
  Service(std::shared_ptr<const pz::Model> model, const pz::RecommenderOptions& options,
          std::int64_t& now)
      : first_(create(model, options)),
        second_(create(std::move(model), options)),
        max_users_(options.max_users),
        now_(now) {}

  void call(Input& in) {
    now_ += in.one_in(8) ? hour * in.byte() : 1;
    switch (in.below(14)) {
      case 0:
      case 1:
      case 2:
        return record(in);
      case 3:
        return record_impression(in);
      case 4:
      case 5:
        return recommend(in);
      case 6:
        return recommend_many(in);
      case 7:
        return rank(in);
      case 8:
        return explain(in);
      case 9:
        return change_items(in);
      case 10:
      case 11:
        return update(in);
      case 12:
        return remove_item(in);
      default:
        return change_users(in);
    }
  }

  void check() const {
    require(first_.user_count() <= max_users_, "no more users are remembered than allowed");
    require(first_.user_count() == second_.user_count(), "the same calls remember the same users");
    require(first_.memory().total() == second_.memory().total(), "the same calls, the same memory");
    require(first_.restarted_states() == 0, "states are finite");
  }

 private:
  static pz::Recommender create(std::shared_ptr<const pz::Model> model,
                                const pz::RecommenderOptions& options) {
    auto shop = pz::Recommender::create(std::move(model), options);
    require(shop.has_value(), "right options are accepted");
    return std::move(*shop);
  }

  std::string_view item_id(Input& in) {
    if (in.one_in(8)) return hostile_id(in);
    const std::uint32_t items = static_cast<std::uint32_t>(model_->item_count());
    return model_->item_id(in.byte() % items);
  }

  std::string_view slate_id(Input& in) {
    if (in.one_in(8)) return hostile_id(in);
    return slates_[in.below(slates_.size())].id;
  }

  std::vector<std::string_view> item_ids(Input& in, std::uint32_t most) {
    std::vector<std::string_view> items(in.below(most + 1));
    for (std::string_view& item : items) item = item_id(in);
    if (in.one_in(32)) items.resize(10'001, "i0");
    return items;
  }

  void record(Input& in) {
    constexpr std::array<std::string_view, 4> types{"view", "click", "", "no such type"};
    const auto impressions = item_ids(in, 6);
    const pz::Interaction event{
        .user = user_id(in),
        .session = in.one_in(3) ? user_id(in) : std::string_view{},
        .item = item_id(in),
        .event_type = types[in.below(types.size())],
        .timestamp = time_of(in),
        .recommendation_id = in.one_in(2) ? slate_id(in) : std::string_view{},
        .impressions = in.one_in(3) ? std::span(impressions) : std::span<const std::string_view>{},
        .event_id = in.one_in(4) ? hostile_id(in) : std::string_view{}};
    require(agree(first_.record(event), second_.record(event)),
            "the same events, the same answers");
  }

  void record_impression(Input& in) {
    const auto items = item_ids(in, 6);
    const pz::Impression impression{
        .user = user_id(in),
        .session = in.one_in(3) ? user_id(in) : std::string_view{},
        .recommendation_id = in.one_in(2) ? slate_id(in) : std::string_view{},
        .items = items,
        .timestamp = time_of(in)};
    require(agree(first_.record_impression(impression), second_.record_impression(impression)),
            "the same impressions, the same answers");
  }

  pz::Request request(Input& in) {
    constexpr std::array<std::uint32_t, 6> counts{1, 5, 25, 10'000, 0, 10'001};
    pz::Request request{.user = user_id(in),
                        .session = in.one_in(3) ? user_id(in) : std::string_view{},
                        .count = counts[in.below(in.one_in(8) ? 6 : 4)],
                        .exclude_interacted = in.one_in(2),
                        .timestamp = time_of(in)};
    if (in.one_in(3)) {
      const std::size_t items = first_.item_count();
      masks_.emplace_back(std::make_unique<pz::ItemMask>(
          in.one_in(8) ? items + 1 : in.byte() % (items + 1), in.one_in(2)));
      for (std::uint32_t i = 0; i < masks_.back()->size(); i += 1 + in.below(5))
        masks_.back()->set(i);
      request.eligible = masks_.back().get();
    }
    return request;
  }

  // What an answer to a right request holds.
  void check(const pz::Request& request, const pz::Slate& slate) const {
    promises::check_slate(slate, request.count, first_);
    const auto model = first_.model();
    for (const pz::Pick& pick : slate.items)
      require(model && model->find_item(pick.item), "no pick is of a removed item");
    if (request.eligible)
      for (const pz::Pick& pick : slate.items) {
        const std::uint32_t item = *first_.find_item(pick.item);
        require(item < request.eligible->size() && request.eligible->test(item),
                "picks are eligible");
      }
    else if (!request.exclude_interacted && !removed_)
      require(slate.items.size() == std::min<std::size_t>(request.count, first_.item_count()),
              "a slate is full where items are left");
  }

  void recommend(Input& in) {
    const pz::Request asked = request(in);
    pz::Slate& slate = slates_[in.below(slates_.size())];
    pz::Slate other;
    const auto done = first_.recommend(asked, slate);
    require(agree(done, second_.recommend(asked, other)), "the same requests, the same answers");
    if (!done) return;
    require(same(slate, other), "the same requests, the same slates");
    check(asked, slate);
  }

  void recommend_many(Input& in) {
    std::vector<pz::Request> asked(in.below(5));
    for (pz::Request& each : asked) each = request(in);
    std::vector<pz::Slate> slates(in.one_in(16) ? 2 : 5), others(slates.size());
    const auto done = first_.recommend(asked, slates);
    require(agree(done, second_.recommend(asked, others)), "the same requests, the same answers");
    if (!done) return;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      require(same(slates[i], others[i]), "the same requests, the same slates");
      check(asked[i], slates[i]);
    }
    if (!slates.empty()) slates_[in.below(slates_.size())] = std::move(slates[0]);
  }

  void rank(Input& in) {
    const pz::Request asked = request(in);
    const auto items = item_ids(in, 10);
    pz::Slate order, other;
    const auto done = first_.rank(asked, items, order);
    require(agree(done, second_.rank(asked, items, other)), "the same requests, the same answers");
    if (!done) return;
    require(same(order, other), "the same requests, the same order");
    promises::check_order(order, items);
  }

  void explain(Input& in) {
    const pz::Request asked = request(in);
    const std::string_view item = item_id(in);
    const auto parts = first_.explain(asked, item), others = second_.explain(asked, item);
    require(parts.has_value() == others.has_value(), "the same requests, the same answers");
    if (!parts) return;
    promises::check_explanation(*parts);
    require(parts->score == others->score, "the same requests, the same scores");
  }

  void change_items(Input& in) {
    constexpr std::array<std::string_view, 5> names{"GENRE", "PRICE", "", "no such field", "GENRE"};
    constexpr std::array<std::string_view, 7> values{"bow",  "bow|sword|bow", "1.5",          "nan",
                                                     "1e99", "|||",           "no such value"};
    static const std::string new_ids = "new0new1new2new3new4new5new6new7";
    pz::NewItem item{
        .item = in.one_in(8) ? item_id(in) : std::string_view(new_ids).substr(4 * in.below(8), 4),
        .creation_timestamp = time_of(in)};
    for (std::uint32_t n = in.below(4); n > 0; --n)
      item.fields.emplace_back(names[in.below(names.size())], values[in.below(values.size())]);
    require(agree(first_.put_item(item), second_.put_item(item)),
            "the same items, the same answers");
  }

  void remove_item(Input& in) {
    const std::string_view item = item_id(in);
    require(agree(first_.remove_item(item), second_.remove_item(item)),
            "the same items are removed");
    removed_ = true;
  }

  void update(Input& in) {
    require(first_.update_due() == second_.update_due(), "the same updates are due");
    const auto now = in.one_in(2) ? std::optional(time_of(in)) : std::nullopt;
    const auto updated = first_.update(now);
    require(agree(updated, second_.update(now)), "the same updates, the same answers");
    require(updated || updated.error().code == pz::Errc::invalid_argument,
            "an update fails where its time does");
    require(!first_.update_report().error, "updates are made");
    require(first_.item_count() >= item_count_, "an update loses no item");
    require(first_.item_count() == second_.item_count(), "both take in the same items");
    item_count_ = first_.item_count();
    const auto model = first_.model(), other = second_.model();
    require(removed_ || model, "what updates made is a model");
    require((model == nullptr) == (other == nullptr), "both made a model");
    if (!model) return;
    require(model->item_count() == other->item_count(), "both models have the same items");
    require(removed_ ? model->item_count() <= item_count_ : model->item_count() == item_count_,
            "the model has the catalogue's items");
    for (std::uint32_t i = 0; i < model->item_count(); ++i)
      require(first_.find_item(model->item_id(i)).has_value(), "the model's items are numbered");
    model_ = model;
  }

  void change_users(Input& in) {
    const std::string_view user = user_id(in), session = user_id(in);
    if (in.one_in(2))
      require(agree(first_.merge_session(session, user), second_.merge_session(session, user)),
              "the same sessions are merged");
    else
      require(first_.forget(user, session) == second_.forget(user, session),
              "the same users are forgotten");
  }

  pz::Recommender first_, second_;
  std::uint64_t max_users_;
  std::int64_t& now_;
  bool removed_ = false;  // an item, at some time
  std::size_t item_count_ = first_.item_count();
  std::shared_ptr<const pz::Model> model_ = first_.model();  // the newest that is one
  std::array<pz::Slate, 4> slates_;
  std::vector<std::unique_ptr<pz::ItemMask>> masks_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::array<std::shared_ptr<const pz::Model>, 2> models{make_model(true),
                                                                      make_model(false)};
  Input in(std::span(data, size));
  const auto& model = models[in.below(2)];
  std::int64_t now = start + 100 * hour;
  Service service(model, options_of(in, now), now);
  for (int calls = 0; calls < 200 && !in.ended(); ++calls) {
    service.call(in);
    service.check();
  }
  return 0;
}
