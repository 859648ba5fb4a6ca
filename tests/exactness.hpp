// Whether a recommender that is opened again after a crash is the one that crashed, bit for bit:
// slates, propensities and explanations, after random calls, in several settings.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "random_calls.hpp"

namespace exactness {

namespace pz = personalize;
using ModelPointer = std::shared_ptr<const pz::Model>;

struct Setting {
  const char* name;
  std::function<void(pz::RecommenderOptions&)> change = [](pz::RecommenderOptions&) {};
  std::vector<ModelPointer> models = {small_model::model()};  // it goes over from one to the next
  bool saves = true;
};

inline std::vector<Setting> settings() {
  using Options = pz::RecommenderOptions;
  static const auto models = [](bool int8) {
    return std::vector<ModelPointer>{
        small_model::model({}, int8),
        small_model::model({.items = 57, .dimension = 17, .hidden = 30, .seed = 2}, int8),
        small_model::model({.items = 44, .seed = 3}, int8)};
  };
  return {
      {"as usual"},
      {"without a save", [](Options&) {}, {small_model::model()}, false},
      {"int8", [](Options&) {}, {small_model::model({}, true)}},
      {"models that come", [](Options&) {}, models(false)},
      {"models that come, int8", [](Options& o) { o.gate_lookup = true; }, models(true)},
      {"without feedback", [](Options& o) { o.feedback = false; }},
      {"gates looked up", [](Options& o) { o.gate_lookup = true; }},
      {"a log", [](Options& o) { o.log = [](const pz::LogEntry&) {}; }},
      {"requests update", [](Options& o) { o.updates = pz::Updates::in_requests; }},
      {"a thread updates", [](Options& o) { o.updates = pz::Updates::by_thread; }},
  };
}

// Of so many calls. Folders: of nobody else. Returns what was not alike; empty: nothing. What it
// opens again it does `crashes` times, at random moments.
inline std::string check(const Setting& setting, std::uint64_t seed, std::uint32_t calls,
                         std::uint32_t crashes, const std::string& folder) {
  namespace fs = std::filesystem;
  const std::string live = folder + "/live", copy = folder + "/copy";
  fs::remove_all(live);
  const auto clock = std::make_shared<std::int64_t>(random_calls::start);
  auto options = random_calls::options(clock);
  std::atomic<std::int64_t> shared_clock{*clock};
  setting.change(options);
  const bool by_thread = options.updates == pz::Updates::by_thread;
  if (by_thread) options.clock = [&shared_clock] { return shared_clock.load(); };
  std::size_t model = 0;
  auto never = pz::Recommender::create(setting.models[0], options);
  auto kept = pz::Recommender::open(live, setting.models[0], options);
  if (!never || !kept) return "cannot begin";
  random_calls::Calls random_call(seed, clock);
  small_model::Random random(seed + 1000);
  std::vector<std::string> said;
  for (std::uint32_t round = 0; round < crashes; ++round) {
    const std::uint32_t here = calls / crashes / 2 + random.below(calls / crashes + 1);
    const auto at = [&](std::uint32_t c) {
      return "crash " + std::to_string(round) + ", call " + std::to_string(c);
    };
    for (std::uint32_t c = 0; c < here; ++c) {
      // When a thread updates, the other recommender does so at other moments.
      if (by_thread)
        random_call.call({&*kept}, said);
      else
        random_call.call({&*never, &*kept}, said);
      shared_clock = *clock;
      if (!by_thread && said[0] != said[1]) return at(c) + ": the one with a folder says otherwise";
      if (setting.saves && random.below(1000) == 0 && !kept->save()) return at(c) + ": no save";
      if (setting.models.size() > 1 && random.below(2000) == 0) {
        model = (model + 1) % setting.models.size();
        const auto swapped = kept->swap(setting.models[model]);
        if (!swapped || swapped->save_error || !never->swap(setting.models[model]))
          return at(c) + ": no swap";
      }
    }
    // A copy that no update came between.
    std::string all;
    for (;;) {
      const auto before = kept->update_report().timestamp;
      fs::remove_all(copy);
      if (by_thread) std::this_thread::sleep_for(std::chrono::milliseconds{50});
      std::error_code moved;
      fs::copy(live, copy, fs::copy_options::recursive, moved);
      all = random_call.everything(*kept);
      if (!moved && kept->update_report().timestamp == before) break;
    }
    auto options_again = options;
    if (by_thread) options_again.updates = pz::Updates::by_caller;
    auto again = pz::Recommender::open(copy, setting.models[model], options_again);
    if (!again) return at(here) + ": " + again.error().message;
    if (random_call.everything(*again) != all) return at(here) + ": it is another one";
    if (by_thread) continue;
    if (random_call.everything(*never) != all) return at(here) + ": the folder changes it";
    for (std::uint32_t c = 0; c < 300; ++c) {
      random_call.call({&*never, &*kept, &*again}, said);
      if (said[0] != said[1] || said[0] != said[2])
        return at(here + c) + ": it goes on as another one";
    }
  }
  return {};
}

}  // namespace exactness
