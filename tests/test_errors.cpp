#include <doctest/doctest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../personalize_runtime.hpp"

namespace pz = personalize;

TEST_CASE("a result holds a value or an error") {
  pz::Result<std::string> value{std::string("text")};
  REQUIRE(value);
  CHECK(value.has_value());
  CHECK(*value == "text");
  CHECK(value->size() == 4);

  pz::Result<std::string> error{pz::Error{pz::Errc::io, "cannot open", 7}};
  REQUIRE_FALSE(error);
  CHECK(error.error().code == pz::Errc::io);
  CHECK(error.error().message == "cannot open");
  CHECK(error.error().offset == 7u);
}

TEST_CASE("a result moves values that cannot be copied") {
  pz::Result<std::unique_ptr<int>> result{std::make_unique<int>(3)};
  const std::unique_ptr<int> taken = *std::move(result);
  CHECK(*taken == 3);
}

TEST_CASE("a result is copied and assigned, whatever it held") {
  using Text = pz::Result<std::string>;
  const std::string long_text(100, 'x');
  const Text value{long_text}, error{pz::Error{pz::Errc::io, long_text + "!", 7}};
  for (const Text& from : {value, error})
    for (const Text& to : {value, error}) {
      const auto same = [&](const Text& one) {
        REQUIRE(one.has_value() == from.has_value());
        if (one)
          CHECK(*one == *from);
        else
          CHECK(one.error().message == from.error().message);
      };
      Text copy = to;
      copy = from;
      same(copy);
      const Text& self = copy;
      copy = self;
      same(copy);
      Text moved = to;
      moved = std::move(copy);
      same(moved);
      same(Text(std::move(moved)));
    }
}

TEST_CASE("a result without a value says only whether it worked") {
  const pz::Result<void> fine;
  CHECK(fine);
  const pz::Result<void> failed{pz::Error{pz::Errc::limit, "too large"}};
  CHECK_FALSE(failed);
  CHECK(failed.error().code == pz::Errc::limit);
  CHECK_FALSE(failed.error().offset.has_value());
}

TEST_CASE("every error code has a name of its own") {
  std::unordered_set<std::string_view> names;
  for (std::uint8_t code = 0; code <= static_cast<std::uint8_t>(pz::Errc::cancelled); ++code)
    names.insert(pz::name(static_cast<pz::Errc>(code)));
  CHECK(names.size() == static_cast<std::size_t>(pz::Errc::cancelled) + 1);
  CHECK(names.count("unknown") == 0);
  CHECK(pz::name(static_cast<pz::Errc>(200)) == "unknown");
  CHECK(pz::name(pz::Errc::out_of_memory) == "out of memory");
}

namespace {

struct Holder {
  std::vector<int> items;
};

pz::Result<Holder> holder() { return Holder{std::vector<int>(100, 7)}; }

}  // namespace

TEST_CASE("a loop over a member of a call's value has something to go over") {
  int sum = 0;
  for (const int item : (*holder()).items) sum += item;  // under AddressSanitizer a finding, if not
  CHECK(sum == 700);
  static_assert(!std::is_reference_v<decltype(*holder())>);
}

TEST_CASE("the version is written once, in the header") {
  CHECK(pz::version == PERSONALIZE_TEST_VERSION);
  CHECK(pz::version == std::to_string(PERSONALIZE_VERSION_MAJOR) + "." +
                           std::to_string(PERSONALIZE_VERSION_MINOR) + "." +
                           std::to_string(PERSONALIZE_VERSION_PATCH));
}

TEST_CASE("a call that runs out of memory says so, and throws nothing") {
  const auto result = pz::detail::catching_bad_alloc([]() -> pz::Result<int> {
    const std::vector<char> much(std::vector<char>().max_size() + 1);
    return static_cast<int>(much.size());
  });
  REQUIRE_FALSE(result);
  CHECK(result.error().code == pz::Errc::out_of_memory);
}
