#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>

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

TEST_CASE("a result without a value says only whether it worked") {
  const pz::Result<void> fine;
  CHECK(fine);
  const pz::Result<void> failed{pz::Error{pz::Errc::limit, "too large"}};
  CHECK_FALSE(failed);
  CHECK(failed.error().code == pz::Errc::limit);
  CHECK_FALSE(failed.error().offset.has_value());
}
