// A recommender so small that thousands a second are opened, with what is asked of one that has
// read what it was given from outside.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "../small_model.hpp"
#include "promises.hpp"

namespace small_shop {

namespace pz = personalize;
using promises::require;

constexpr std::int64_t now = 1'700'000'000;

inline const std::shared_ptr<const pz::Model>& model() {
  static const auto made = [] {
    auto parts = small_model::parts({.items = 9, .dimension = 3, .hidden = 2});
    for (std::size_t i = 0; i < parts.statistics.size(); ++i)
      parts.statistics[i] = {i % 2 == 0 ? 0u : 50u, now - 90'000, now - 10'000, now - 86'400};
    auto whole = pz::Model::from_parts(std::move(parts));
    if (!whole) std::abort();
    return *whole;
  }();
  return made;
}

inline pz::RecommenderOptions options() {
  pz::RecommenderOptions options;
  options.clock = [] { return now; };
  options.updates = pz::Updates::by_caller;
  options.recommendation_key = {{1, 2}};
  options.history_length = 20;
  options.max_users = 64;
  options.user_bytes = 1 << 18;
  options.slate_log_bytes = options.context_bytes = options.pending_bytes = 1 << 16;
  options.remembered_slates = 8;
  options.remembered_event_ids = 64;
  options.durability = pz::Durability::none;
  return options;
}

// A memory's folder where there is one: a disk's would cost more than all else.
class Folder {
 public:
  Folder() {
    const bool memory = ::access("/dev/shm", W_OK) == 0;
    std::string name =
        (memory ? std::filesystem::path("/dev/shm") : std::filesystem::temp_directory_path()) /
        "personalize_XXXXXX";
    if (!::mkdtemp(name.data())) std::abort();
    path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
};

// Some of all calls.
inline void fill(pz::Recommender& shop) {
  for (int n = 0; n < 12; ++n) {
    const std::string user = "u" + std::to_string(n % 3), item = "i" + std::to_string(n * 5 % 9);
    const auto slate = shop.recommend({.user = user, .count = 4});
    require(slate.has_value(), "a request is answered");
    const std::vector<std::string_view> items{"i1", "i2", "i8"};
    require(shop.record_impression({.user = user, .recommendation_id = slate->id}).has_value() &&
                shop.record({.user = user,
                             .item = n % 2 == 0 ? std::string_view(item) : slate->items[0].item,
                             .event_type = n % 4 == 0 ? "click" : "view",
                             .timestamp = now - 100 + n,
                             .recommendation_id = slate->id,
                             .event_id = item})
                    .has_value() &&
                shop.record({.session = "s", .item = item, .impressions = items}).has_value(),
            "events are recorded");
    if (n == 4) {
      require(shop.merge_session("s", "u1").has_value(), "a session is merged");
      require(shop.put_item({.item = "new", .fields = {{"GENRE", "bow|sword"}, {"PRICE", "2"}}})
                  .has_value(),
              "an item is put");
      require(shop.record({.user = "u2", .item = "new"}).has_value(), "its event waits");
      require(shop.remove_item("i7").has_value(), "an item is removed");
    }
    if (n == 6) require(shop.update().has_value(), "an update is made");
    if (n == 8) {
      const auto blob = shop.export_user("u2");
      require(blob.has_value() && shop.forget("u2") && shop.import_user(*blob).has_value(),
              "a user leaves and comes back");
    }
    (void)shop.explain({.user = user}, item);
  }
}

// Whatever it was told, it keeps its promises.
inline void use(pz::Recommender& shop) {
  for (const std::string_view user : {"u0", "u1", "u2", "nobody"}) {
    const auto slate = shop.recommend({.user = user, .session = "s", .count = 5});
    require(slate.has_value(), "a request is answered");
    promises::check_slate(*slate, 5, shop);
    if (!slate->items.empty()) {
      const auto known = shop.record({.user = user,
                                      .item = slate->items[0].item,
                                      .event_type = "click",
                                      .recommendation_id = slate->id});
      require(known && *known == pz::Recorded::learned, "an answer to a slate is learnt");
    }
    const auto parts = shop.explain({.user = user}, "i1");
    if (parts) promises::check_explanation(*parts);
    const auto blob = shop.export_user(user);
    require(blob.has_value(), "a user is exported");
    if (!blob->empty()) require(shop.import_user(*blob).has_value(), "and comes in again");
  }
  const std::vector<std::string_view> items{"i1", "i2", "i8"};
  require(shop.record({.user = "u0", .session = "s", .item = "i2", .impressions = items}) &&
              shop.record({.user = "u1", .item = "new"}),
          "events are recorded");
  require(shop.update().has_value(), "an update succeeds");
  (void)shop.forget("u0");
  const auto slate = shop.recommend({.user = "u1", .count = 100});
  require(slate.has_value(), "a request is answered");
  promises::check_slate(*slate, 100, shop);
}

}  // namespace small_shop
