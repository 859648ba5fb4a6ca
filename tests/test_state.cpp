// What outlives the process: state files, journals, users as blobs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "random_calls.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace state_tests {

namespace pz = personalize;

namespace {

using random_calls::Calls;
using random_calls::Clock;

pz::Recommender open(const std::string& folder, const pz::RecommenderOptions& options,
                     const std::shared_ptr<const pz::Model>& model = small_model::model()) {
  auto shop = pz::Recommender::open(folder, model, options);
  if (!shop) MESSAGE(shop.error().message);
  REQUIRE(shop);
  return std::move(*shop);
}

pz::Recommender make(const pz::RecommenderOptions& options,
                     const std::shared_ptr<const pz::Model>& model = small_model::model()) {
  auto shop = pz::Recommender::create(model, options);
  REQUIRE(shop);
  return std::move(*shop);
}

// As a process that is killed leaves it: its files, without its memory.
void copy_folder(const std::string& from, const std::string& to) {
  std::filesystem::remove_all(to);
  std::filesystem::copy(from, to, std::filesystem::copy_options::recursive);
}

}  // namespace

TEST_CASE("a recommender that is opened again says what one says that never ended") {
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    auto options = random_calls::options(clock);
    Calls calls(seed, clock);
    pz::Recommender never = make(options);
    pz::Recommender kept = open(folder.file("a"), options);
    CHECK_FALSE(kept.recovery().found);
    std::vector<std::string> said;
    small_model::Random random(seed);
    for (int round = 0; round < 6; ++round) {
      const std::uint32_t count = 500 + random.below(1500);
      for (std::uint32_t c = 0; c < count; ++c) {
        calls.call({&never, &kept}, said);
        REQUIRE(said[0] == said[1]);
        if (random.below(400) == 0) {
          const auto saved = kept.save();
          REQUIRE(saved);
        }
      }
      const std::string crashed = folder.file("b");
      copy_folder(folder.file("a"), crashed);
      pz::Recommender again = open(crashed, options);
      CHECK(again.recovery().found);
      CHECK_FALSE(again.recovery().clean);
      const std::string all = calls.everything(never);
      CHECK(calls.everything(again) == all);
      CHECK(calls.everything(kept) == all);
      // And goes on alike.
      for (std::uint32_t c = 0; c < 300; ++c) {
        calls.call({&never, &kept, &again}, said);
        REQUIRE(said[0] == said[1]);
        REQUIRE(said[0] == said[2]);
      }
    }
  }
}

TEST_CASE("a state file holds all that there is, and goes on alike") {
  for (const std::uint64_t seed : {11u, 12u}) {
    CAPTURE(seed);
    const TemporaryFolder folder;
    const Clock clock = std::make_shared<std::int64_t>(random_calls::start);
    auto options = random_calls::options(clock);
    Calls calls(seed, clock);
    pz::Recommender shop = make(options);
    std::vector<std::string> said;
    for (int c = 0; c < 3000; ++c) calls.call({&shop}, said);
    const auto saved = shop.save(folder.file("state.pzs"));
    REQUIRE(saved);
    CHECK(saved->bytes == std::filesystem::file_size(folder.file("state.pzs")));
    auto again = pz::Recommender::restore(folder.file("state.pzs"), small_model::model(), options);
    if (!again) MESSAGE(again.error().message);
    REQUIRE(again);
    CHECK(again->user_count() == shop.user_count());
    CHECK(calls.everything(*again) == calls.everything(shop));
    for (int c = 0; c < 3000; ++c) {
      calls.call({&shop, &*again}, said);
      REQUIRE(said[0] == said[1]);
    }
  }
}

}  // namespace state_tests
