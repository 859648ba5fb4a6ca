// Random calls of a recommender, the same for the same seed, and what everybody can see of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"

namespace random_calls {

namespace pz = personalize;

constexpr std::int64_t start = 1'700'000'000;

// Of a copy of the calls' clock, so that it can be set.
using Clock = std::shared_ptr<std::int64_t>;

inline pz::RecommenderOptions options(const Clock& clock) {
  pz::RecommenderOptions options;
  options.clock = [clock] { return *clock; };
  options.updates = pz::Updates::by_caller;
  options.update_interval = std::chrono::hours{1};
  options.exploration_weight = 0.4f;
  options.recommendation_key = {{1, 2}};
  options.history_length = 12;
  options.max_users = 64 * 4;  // so that users leave
  options.slate_log_bytes = 1 << 18;
  options.remembered_slates = 400;
  options.remembered_event_ids = 256;
  options.context_bytes = 1 << 16;
  options.durability = pz::Durability::none;
  options.seed = 7;
  return options;
}

// Makes calls, and adds all that they return to a text.
class Calls {
 public:
  Calls(std::uint64_t seed, Clock clock, std::uint32_t users = 400)
      : random_(seed), clock_(std::move(clock)), users_(users) {}

  // One call of each recommender, with the same arguments; returns what each says.
  void call(const std::vector<pz::Recommender*>& shops, std::vector<std::string>& said) {
    said.assign(shops.size(), {});
    const auto each = [&](auto one) {
      for (std::size_t s = 0; s < shops.size(); ++s) one(*shops[s], said[s]);
    };
    if (random_.below(8) == 0) *clock_ += random_.below(600);
    if (random_.below(3000) == 0) *clock_ += 86'400;
    const std::string user = id("u", random_.below(users_)), session = id("s", random_.below(40));
    const std::string item = id("i", random_.below(55));
    const std::int64_t time = *clock_ - random_.below(1000);
    const bool visitor = random_.below(6) == 0;
    const std::string_view none, of_user = visitor ? none : user,
                                 of_session = visitor ? session : none;
    switch (random_.below(40)) {
      default: {  // a slate
        const std::uint32_t count = 1 + random_.below(12);
        const bool exclude = random_.below(4) == 0;
        std::string recommended;
        each([&](pz::Recommender& shop, std::string& text) {
          const auto slate = shop.recommend({.user = of_user,
                                             .session = of_session,
                                             .count = count,
                                             .exclude_interacted = exclude,
                                             .timestamp = time});
          if (!slate) return say(text, slate.error().message);
          for (const pz::Pick& pick : slate->items) {
            say(text, pick.item);
            say(text, pick.score);
            say(text, pick.propensity);
            say(text, pz::name(pick.reason));
          }
          say(text, slate->id);
          recommended = slate->id;
        });
        slates_.push_back({visitor ? session : user, visitor, recommended});
        if (slates_.size() > 300) slates_.pop_front();
        break;
      }
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
      case 5:
      case 6:
      case 7:
      case 8:
      case 9: {
        // an event, perhaps with an id that came before, perhaps with a session that becomes the
        // user's, perhaps an answer to a slate
        pz::Interaction event{.user = of_user,
                              .session = of_session,
                              .item = item,
                              .event_type = random_.below(3) == 0 ? "click" : "view",
                              .timestamp = time};
        const std::string event_id = id("e", random_.below(2000));
        if (random_.below(2) == 0) event.event_id = event_id;
        if (!visitor && random_.below(20) == 0) event.session = session;
        Asked asked;
        if (!slates_.empty() && random_.below(2) == 0) {
          asked = slates_[random_.below(static_cast<std::uint32_t>(slates_.size()))];
          (asked.visitor ? event.session : event.user) = asked.who;
          (asked.visitor ? event.user : event.session) = {};
          event.recommendation_id = asked.id;
        }
        std::vector<std::string> shown;
        std::vector<std::string_view> views;
        if (random_.below(4) == 0) list(shown, views);
        event.impressions = views;
        each([&](pz::Recommender& shop, std::string& text) {
          const auto recorded = shop.record(event);
          say(text, recorded ? pz::name(*recorded) : recorded.error().message);
        });
        break;
      }
      case 10:
      case 11: {
        std::vector<std::string> shown;
        std::vector<std::string_view> views;
        list(shown, views);
        pz::Impression impression{
            .user = of_user, .session = of_session, .items = views, .timestamp = time};
        if (!slates_.empty() && random_.below(2) == 0) {
          const Asked& asked = slates_[random_.below(static_cast<std::uint32_t>(slates_.size()))];
          impression.user = asked.visitor ? none : asked.who;
          impression.session = asked.visitor ? asked.who : none;
          impression.recommendation_id = asked.id;
          if (random_.below(2) == 0) impression.items = {};
        }
        each([&](pz::Recommender& shop, std::string& text) {
          const auto recorded = shop.record_impression(impression);
          say(text, recorded ? pz::name(*recorded) : recorded.error().message);
        });
        break;
      }
      case 12:
        each([&](pz::Recommender& shop, std::string& text) {
          const auto merged = shop.merge_session(session, user);
          say(text, merged && *merged ? "merged" : "no");
        });
        break;
      case 13:
        if (random_.below(4) != 0) break;
        each([&](pz::Recommender& shop, std::string& text) {
          say(text, shop.forget(of_user, of_session) ? "forgot" : "no");
        });
        break;
      case 14: {
        const char* const genre = genres[random_.below(4)];
        pz::NewItem put{.item = item, .fields = {{"GENRE", genre}}};
        if (random_.below(3) == 0) put.creation_timestamp = time;
        if (random_.below(4) == 0) put.fields = {};
        each([&](pz::Recommender& shop, std::string& text) {
          const auto done = shop.put_item(put);
          say(text, done ? "put" : done.error().message);
        });
        break;
      }
      case 15:
        if (random_.below(3) != 0) break;
        each([&](pz::Recommender& shop, std::string& text) {
          const auto removed = shop.remove_item(item);
          say(text, removed && *removed ? "removed" : "no");
        });
        break;
      case 16:
        each([&](pz::Recommender& shop, std::string& text) {
          if (!shop.update()) say(text, "error");
        });
        break;
      case 17:
        each([&](pz::Recommender& shop, std::string& text) {
          explain(shop, of_user, of_session, item, time, text);
        });
        break;
      case 18: {
        std::vector<std::string> shown;
        std::vector<std::string_view> views;
        list(shown, views);
        each([&](pz::Recommender& shop, std::string& text) {
          pz::Slate slate;
          if (!shop.rank({.user = of_user, .session = of_session, .timestamp = time}, views, slate))
            say(text, "error");
          for (const pz::Pick& pick : slate.items) {
            say(text, pick.item);
            say(text, pick.score);
          }
        });
        break;
      }
      case 19: {
        if (random_.below(4) != 0) break;
        // A user is taken out and comes back.
        each([&](pz::Recommender& shop, std::string& text) {
          const auto blob = shop.export_user(of_user, of_session);
          if (!blob) return say(text, blob.error().message);
          if (blob->empty()) return say(text, "nobody");
          (void)shop.forget(of_user, of_session);
          const auto imported = shop.import_user(*blob);
          say(text, imported ? "imported" : imported.error().message);
        });
        break;
      }
    }
  }

  // What is known of some users and items: explanations, bit for bit. Changes nothing but when
  // users were last used.
  std::string everything(pz::Recommender& shop) const {
    std::string text;
    say(text, static_cast<float>(shop.user_count()));
    say(text, static_cast<float>(shop.item_count()));
    for (std::uint32_t u = 0; u < users_; u += 7)
      for (std::uint32_t i = 0; i < 60; i += 11)
        explain(shop, id("u", u), "", id("i", i), *clock_, text);
    return text;
  }

 private:
  static constexpr const char* genres[] = {"bow", "sword", "shield|bow", "none"};
  struct Asked {
    std::string who;
    bool visitor = false;
    std::string id;
  };

  static std::string id(const char* kind, std::uint32_t number) {
    return kind + std::to_string(number);
  }
  static void say(std::string& text, std::string_view what) {
    text += what;
    text += '|';
  }
  static void say(std::string& text, float number) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    say(text, std::to_string(bits));
  }
  static void explain(pz::Recommender& shop, std::string_view user, std::string_view session,
                      std::string_view item, std::int64_t time, std::string& text) {
    const auto parts = shop.explain({.user = user, .session = session, .timestamp = time}, item);
    if (!parts) return say(text, parts.error().message);
    for (const float part :
         {parts->score, parts->relevance, parts->quality, parts->taste, parts->discount,
          parts->uncertainty, static_cast<float>(parts->positive),
          static_cast<float>(parts->expected)})
      say(text, part);
    say(text, std::to_string(parts->age.value_or(-1)));
    say(text, parts->explorable ? "pool" : "");
  }
  void list(std::vector<std::string>& shown, std::vector<std::string_view>& views) {
    for (std::uint32_t i = 1 + random_.below(8); i > 0; --i)
      shown.push_back(id("i", random_.below(60)));
    views.assign(shown.begin(), shown.end());
  }

  small_model::Random random_;
  Clock clock_;
  std::uint32_t users_;
  std::deque<Asked> slates_;
};

}  // namespace random_calls
