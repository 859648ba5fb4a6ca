#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"

namespace pz = personalize;

TEST_CASE("a string table numbers what it is given, in order") {
  pz::StringTable table;
  CHECK_FALSE(table.find("x").has_value());
  for (std::uint32_t i = 0; i < 10'000; ++i) {
    const auto added = table.add("id-" + std::to_string(i * 7));
    REQUIRE(added);
    REQUIRE(*added == i);
  }
  CHECK(table.size() == 10'000);
  for (std::uint32_t i = 0; i < 10'000; ++i) {
    REQUIRE(table[i] == "id-" + std::to_string(i * 7));
    REQUIRE(table.find("id-" + std::to_string(i * 7)) == i);
  }
  CHECK_FALSE(table.find("id-1").has_value());
}

TEST_CASE("an id is UTF-8 without control characters, wherever in it the fault stands") {
  using namespace std::string_literals;
  for (const auto& text :
       {"sword"s, "a longer id with blanks ~ and more"s, "\u00e4"s, "\u00a0"s, "\u20ac"s,
        "\ud7ff\ue000"s, "\U00010000\U0010ffff"s, ""s, "\u07ff\u0800\uffff"s})
    CHECK_MESSAGE(pz::detail::valid_id(text), text);
  const std::vector<std::string> faults{"\0"s,
                                        "\x1f",
                                        "\n",
                                        "\x7f",
                                        "\xc2\x80",
                                        "\xc2\x9f",
                                        "\x80",
                                        "\xbf",
                                        "\xc0\x80",
                                        "\xc1\xbf",
                                        "\xc3",
                                        "\xe2\x82",
                                        "\xe0\x9f\xbf",
                                        "\xed\xa0\x80",
                                        "\xed\xbf\xbf",
                                        "\xf0\x8f\xbf\xbf",
                                        "\xf4\x90\x80\x80",
                                        "\xf5\x80\x80\x80",
                                        "\xff",
                                        "\xe2\x28\xa1",
                                        "\xf0\x90\x80\x28"};
  for (const std::string& fault : faults)
    for (std::size_t before = 0; before < 20; ++before)
      for (const std::size_t behind : {0u, 1u, 8u}) {
        const std::string text = std::string(before, 'x') + fault + std::string(behind, 'y');
        REQUIRE_FALSE(pz::detail::valid_id(text));
        pz::StringTable table;
        const auto added = table.add(text);
        REQUIRE_FALSE(added);
        REQUIRE(added.error().code == pz::Errc::invalid_argument);
        REQUIRE(table.empty());
      }
}

TEST_CASE("quantised rows are within half a step, zero rows stay zero") {
  small_model::Random random{5};
  pz::Matrix m = small_model::random_matrix(random, 30, 33, 2.0f);
  for (std::size_t c = 0; c < 33; ++c) m.f32()[4 * 33 + c] = 0;
  const pz::Matrix q = m.quantised();
  CHECK(q.type() == pz::ElementType::i8);
  for (std::size_t r = 0; r < 30; ++r) {
    float largest = 0;
    for (std::size_t c = 0; c < 33; ++c) {
      largest = std::max(largest, std::abs(m.at(r, c)));
      REQUIRE(std::abs(q.at(r, c) - m.at(r, c)) <= 0.5001f * q.scales()[r]);
    }
    CHECK(q.scales()[r] == doctest::Approx(largest / 127));
  }
  CHECK(q.scales()[4] == 0);
  CHECK(q.quantised() == q);
}

TEST_CASE("rows of 4 bits come back as int8 products of a group's scale, close to what they were") {
  small_model::Random random{6};
  constexpr std::size_t columns = 70;
  pz::ModelParts parts = small_model::parts({.items = 200, .dimension = columns});
  // Groups of 24 columns of different size, which one scale a row would not serve.
  for (std::size_t r = 0; r < 200; ++r)
    for (std::size_t c = 0; c < columns; ++c)
      parts.item_vectors.f32()[r * columns + c] =
          r == 7 ? 0.0f : random.normal() * (c / 24 % 2 == 0 ? 1.0f : 0.3f);
  const auto file = pz::write_model(parts, {.element_type = pz::ElementType::i4, .zstd_level = 0});
  REQUIRE(file);
  const auto sections = pz::list_sections(*file);
  REQUIRE(sections);
  for (const pz::SectionInfo& section : *sections)
    if (section.label() == "IVEC") {
      CHECK(section.element_type == pz::ElementType::i4);
      CHECK(section.raw_size == 200 * (4 + 2 + 35));
    }
  const auto read = pz::read_model(*file);
  REQUIRE(read);
  const pz::Matrix& q = read->item_vectors;
  double error = 0, total = 0, plain_error = 0;
  for (std::size_t r = 0; r < 200; ++r) {
    float largest = 0;
    for (std::size_t c = 0; c < columns; ++c)
      largest = std::max(largest, std::abs(parts.item_vectors.at(r, c)));
    for (std::size_t c = 0; c < columns; ++c) {
      const double v = parts.item_vectors.at(r, c), e = v - static_cast<double>(q.at(r, c));
      error += e * e;
      total += v * v;
      const double step = largest > 0 ? largest / 7.0 : 1.0,
                   p = v - step * std::nearbyint(v / step);
      plain_error += p * p;
    }
    for (std::size_t begin = 0; begin < columns; begin += 24) {
      bool some_scale = false;
      for (int m = 1; m <= 15 && !some_scale; ++m) {
        some_scale = true;
        for (std::size_t c = begin; c < std::min(begin + 24, columns); ++c) {
          const int value = q.i8()[r * columns + c];
          some_scale = some_scale && value % m == 0 && value / m >= -8 && value / m <= 7;
        }
      }
      REQUIRE(some_scale);
    }
  }
  CHECK(error < 0.008 * total);
  CHECK(plain_error > 2 * error);
}

TEST_CASE("time gaps fall into log2 buckets, hostile timestamps included") {
  CHECK(pz::time_gap_bucket(std::nullopt, 5, 12) == 0);
  CHECK(pz::time_gap_bucket(100, 100, 12) == 1);
  CHECK(pz::time_gap_bucket(100, 50, 12) == 1);  // time that runs backwards counts as none
  CHECK(pz::time_gap_bucket(100, 101, 12) == 2);
  CHECK(pz::time_gap_bucket(100, 102, 12) == 2);
  CHECK(pz::time_gap_bucket(100, 103, 12) == 3);
  CHECK(pz::time_gap_bucket(0, 1 << 20, 12) == 11);
  CHECK(pz::time_gap_bucket(std::numeric_limits<std::int64_t>::min(),
                            std::numeric_limits<std::int64_t>::max(), 40) == 39);
}

TEST_CASE("the vector of an item that has only metadata is the sum of its values") {
  const auto model = small_model::model();
  const auto& genre = model->parts().fields[0].embedding;
  const auto& price = model->parts().fields[1].embedding;
  std::vector<float> out(model->dimension());
  using Fields = std::vector<std::pair<std::string_view, std::string_view>>;
  CHECK(model->metadata_vector(Fields{{"GENRE", "bow|shield|unheard"}, {"PRICE", "2.5"}}, out) ==
        3);
  for (std::size_t c = 0; c < out.size(); ++c)
    CHECK(out[c] == doctest::Approx(genre.at(0, c) + genre.at(2, c) + price.at(2, c)));
  CHECK(model->metadata_vector(Fields{{"PRICE", "cheap"}, {"PRICE", "nan"}, {"COLOUR", "red"}},
                               out) == 0);
  for (const float v : out) CHECK(v == 0);
  CHECK(model->metadata_vector(Fields{{"PRICE", "-7"}}, out) == 1);
  CHECK(out[0] == price.at(0, 0));
}

TEST_CASE("items are found by id") {
  const auto model = small_model::model({.items = 1000});
  CHECK(model->item_count() == 1000);
  for (std::uint32_t i = 0; i < 1000; ++i) REQUIRE(model->find_item(model->item_id(i)) == i);
  CHECK_FALSE(model->find_item("i1000").has_value());
  CHECK_FALSE(model->find_item("").has_value());
}
