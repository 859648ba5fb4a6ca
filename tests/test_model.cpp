#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <clocale>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

// Of its own: several test files are compiled as one.
namespace model_tests {

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

TEST_CASE("a table survives strings that are made to fall together, and loses none") {
  // Ids whose hashes agree in their last 14 bits: they want one slot of a table of any usual size,
  // and part in a larger one.
  std::vector<std::string> together;
  for (std::uint64_t i = 0; together.size() < 600; ++i) {
    std::string id = std::to_string(i);
    if ((pz::xxh64(std::as_bytes(std::span(id))) & 0x3fff) == 0) together.push_back(std::move(id));
  }
  pz::StringTable table;
  std::size_t added = 0;
  for (const std::string& id : together) {
    REQUIRE(table.add(id));
    ++added;
  }
  CHECK(added == 600);
  // The table goes on and grows, and has what it took.
  std::vector<std::string> taken(together.begin(),
                                 together.begin() + static_cast<std::ptrdiff_t>(added));
  for (std::uint32_t i = 0; i < 20'000; ++i)
    if (table.add("x" + std::to_string(i))) taken.push_back("x" + std::to_string(i));
  CHECK(taken.size() > 600);
  REQUIRE(table.size() == taken.size());
  for (std::size_t i = 0; i < taken.size(); ++i) REQUIRE(table.find(taken[i]) == i);
}

TEST_CASE("strings of a file are numbered as they come, in pieces of any size") {
  std::vector<std::string> texts;
  for (std::uint32_t i = 0; i < 3000; ++i)
    texts.push_back("id-" + std::to_string(i) + std::string(i % 97, 'x'));
  std::size_t bytes = 0;
  for (const std::string& text : texts) bytes += text.size();
  const auto fill = [&](pz::StringTable& table) {
    const auto [lengths, text] = table.make_room(texts.size(), bytes);
    std::size_t at = 0;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const auto length = static_cast<std::uint16_t>(texts[i].size());
      std::memcpy(lengths.data() + 2 * i, &length, 2);
      std::memcpy(text.data() + at, texts[i].data(), length);
      at += length;
    }
  };
  const auto equal = [&](pz::StringTable& table) {
    REQUIRE(table.size() == texts.size());
    for (std::uint32_t i = 0; i < texts.size(); ++i) {
      REQUIRE(table[i] == texts[i]);
      REQUIRE(table.find(texts[i]) == i);
    }
    REQUIRE(table.add("one more"));
    REQUIRE(table[texts.size()] == "one more");
    REQUIRE(table.find("one more") == texts.size());
  };
  for (const std::size_t piece : {1u, 64u, 1000u, 1u << 20}) {
    pz::StringTable table;
    fill(table);
    pz::StringTable::Numbering numbering;
    const std::size_t all = bytes + 2 * texts.size();
    for (std::size_t at = piece; at < all; at += piece) REQUIRE(table.number(numbering, at));
    REQUIRE(table.number(numbering, all));
    equal(table);
  }
  pz::StringTable whole;
  fill(whole);
  REQUIRE(whole.number());
  equal(whole);
  // Lengths that end before the text, or behind it.
  for (const int wrong : {1, -1}) {
    pz::StringTable table;
    const auto [lengths, text] = table.make_room(1, 4);
    const auto length = static_cast<std::uint16_t>(4 + wrong);
    std::memcpy(lengths.data(), &length, 2);
    std::memcpy(text.data(), "text", 4);
    const auto refused = table.number();
    REQUIRE_FALSE(refused);
    CHECK(refused.error().message.find("do not add up") != std::string::npos);
  }
  // A string that stands twice is noticed when it comes, not before.
  texts[2000] = texts[1000];
  bytes = 0;
  for (const std::string& text : texts) bytes += text.size();
  pz::StringTable twice;
  fill(twice);
  pz::StringTable::Numbering numbering;
  CHECK(twice.number(numbering, 2 * texts.size() + 20'000));
  const auto refused = twice.number(numbering, 2 * texts.size() + bytes);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().message.find("string 2000: ") == 0);
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

TEST_CASE("an int8 row of a value that is not finite is not finite") {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    pz::Matrix m = pz::Matrix::zeros(2, 5, pz::ElementType::i8);
    REQUIRE(m.finite());
    m.set_row(1, std::vector<float>{1, 2, bad, 4, 5});
    CHECK_FALSE(m.finite());
    m.set_row(1, std::vector<float>{1, 2, 3, 4, 5});
    CHECK(m.finite());
    CHECK(m.at(1, 4) == doctest::Approx(5));
  }
}

TEST_CASE("an int8 matrix is finite where its products are") {
  pz::Matrix m = pz::Matrix::zeros(1, 2, pz::ElementType::i8);
  m.i8()[0] = 127;
  m.scales()[0] = 2e36f;
  CHECK(m.finite());
  CHECK(m.magnitude() == doctest::Approx(127 * 2e36f));
  m.scales()[0] = -3e38f;
  CHECK_FALSE(m.finite());
  CHECK(pz::Matrix().finite());
}

TEST_CASE("a matrix that is shortened and grows again has zeros where there were values") {
  for (const auto type : {pz::ElementType::f32, pz::ElementType::i8}) {
    pz::Matrix m = pz::Matrix::zeros(3, 20, type);
    for (std::size_t r = 0; r < 3; ++r) m.set_row(r, std::vector<float>(20, 1));
    m.resize_rows(1);
    m.resize_rows(3);
    CHECK(m.at(0, 19) == doctest::Approx(1));
    for (std::size_t r = 1; r < 3; ++r)
      for (std::size_t c = 0; c < 20; ++c) REQUIRE(m.at(r, c) == 0);
    // A scale of its own, too.
    if (type == pz::ElementType::i8) CHECK(m.scales()[2] == 0);
  }
}

TEST_CASE("rows of any size are written right in 4 bits, denormal ones included") {
  small_model::Random random{8};
  for (const float size : {1.0f, 1e-20f, 1e-36f, 1e-38f, 1e-40f, 1e-43f, 1e17f}) {
    CAPTURE(size);
    pz::ModelParts parts = small_model::parts({.items = 40, .dimension = 48});
    for (float& v : parts.item_vectors.f32()) v = random.symmetric() * size;
    const auto file =
        pz::write_model(parts, {.element_type = pz::ElementType::i4, .zstd_level = 0});
    REQUIRE(file);
    const auto read = pz::read_model(*file);
    REQUIRE(read);
    for (std::size_t r = 0; r < 40; ++r)
      for (std::size_t c = 0; c < 48; ++c) {
        const double want = parts.item_vectors.at(r, c), got = read->item_vectors.at(r, c);
        // A step of 4 bits, and what the least float leaves of a row's scale.
        REQUIRE(std::abs(want - got) <= static_cast<double>(size) / 7 + 60 * 1.5e-45);
      }
  }
}

TEST_CASE("fingerprints differ where one value differs that they stand for, and only there") {
  const auto plain = [] { return small_model::parts({.items = 6, .dimension = 5, .hidden = 3}); };
  const auto rounded = [&] { return small_model::quantised(plain()); };
  const auto with_inputs = [&] {
    pz::ModelParts parts = plain();
    small_model::Random random{2};
    parts.input_vectors = small_model::random_matrix(random, 6, 5, 1);
    return parts;
  };
  const auto changes = [](const auto& make, auto change, bool encoder, bool items) {
    pz::ModelParts parts = make();
    change(parts);
    const pz::Fingerprints before = pz::fingerprints_of(make()), now = pz::fingerprints_of(parts);
    CHECK((before.encoder != now.encoder) == encoder);
    CHECK((before.items != now.items) == items);
  };
  using Parts = pz::ModelParts;
  changes(
      plain, [](Parts&) {}, false, false);
  for (std::size_t w = 0; w < plain().weights.size(); ++w)
    changes(
        plain, [&](Parts& p) { p.weights[w].f32().back() += 1; }, true, false);
  changes(
      plain, [](Parts& p) { p.operations[3].argument = 4; }, true, false);
  changes(
      plain, [](Parts& p) { p.time_gap_embedding.f32()[1] += 1; }, true, false);
  changes(
      plain, [](Parts& p) { p.event_type_embedding.f32()[1] += 1; }, true, false);
  changes(
      plain, [](Parts& p) { REQUIRE(p.event_types.add("buy")); }, true, false);
  changes(
      plain, [](Parts& p) { p.biases.back() += 1; }, false, true);
  changes(
      plain, [](Parts& p) { REQUIRE(p.item_ids.add("i6")); }, false, true);
  // An item's vector is also what the encoder takes in, where it has no other.
  changes(
      plain, [](Parts& p) { p.item_vectors.f32().back() += 1; }, true, true);
  changes(
      with_inputs, [](Parts& p) { p.item_vectors.f32().back() += 1; }, false, true);
  changes(
      with_inputs, [](Parts& p) { p.input_vectors.f32().back() += 1; }, true, false);
  changes(
      rounded, [](Parts& p) { p.item_vectors.scales().back() *= 2; }, true, true);
  changes(
      rounded, [](Parts& p) { p.item_vectors.i8().back() ^= 1; }, true, true);
  // What neither states nor sums depend on.
  changes(
      plain, [](Parts& p) { p.metadata = "{}"; }, false, false);
  changes(
      plain, [](Parts& p) { p.statistics[0].interactions += 1; }, false, false);
  changes(
      plain, [](Parts& p) { p.fields.clear(); }, false, false);
  // The same values in another shape, or letters on the other side of a boundary.
  const auto of_ids = [&](std::string_view a, std::string_view b) {
    pz::ModelParts parts = plain();
    parts.item_ids = {};
    REQUIRE(parts.item_ids.add(a));
    REQUIRE(parts.item_ids.add(b));
    return pz::fingerprints_of(parts).items;
  };
  CHECK(of_ids("ab", "c") != of_ids("a", "bc"));
  const auto of_shape = [&](std::size_t rows, std::size_t columns) {
    pz::ModelParts parts = plain();
    parts.time_gap_embedding = pz::Matrix::zeros(rows, columns);
    return pz::fingerprints_of(parts).encoder;
  };
  CHECK(of_shape(4, 6) != of_shape(6, 4));
}

TEST_CASE(
    "a model bears the fingerprints of its parts, and one with items that came in keeps them") {
  const pz::ModelParts parts = small_model::parts();
  const auto model = small_model::model();
  CHECK(model->fingerprints() == pz::fingerprints_of(parts));
  CHECK(model->parts().fingerprints == model->fingerprints());
  auto shop = pz::Recommender::create(model);
  REQUIRE(shop);
  REQUIRE(shop->put_item({.item = "new", .fields = {{"GENRE", "bow"}}}));
  REQUIRE(shop->update());
  const auto whole = shop->model();
  REQUIRE(whole->find_item("new"));
  CHECK(whole->fingerprints() == model->fingerprints());
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

namespace {

// The C library's locale while this lives: one whose decimal point is a comma.
class GermanLocale {
 public:
  GermanLocale() {
    if (std::setlocale(LC_ALL, "de_DE.UTF-8")) return;
    const std::string make = "localedef -i de_DE -f UTF-8 " + folder_.file("de_DE.UTF-8");
    REQUIRE(std::system(make.c_str()) == 0);
    REQUIRE(::setenv("LOCPATH", folder_.path.c_str(), 1) == 0);
    REQUIRE(std::setlocale(LC_ALL, "de_DE.UTF-8"));
  }
  ~GermanLocale() {
    std::setlocale(LC_ALL, "C");
    ::unsetenv("LOCPATH");
  }

 private:
  TemporaryFolder folder_;
};

}  // namespace

TEST_CASE("numbers of metadata have a point, whatever the locale") {
  const GermanLocale locale;
  REQUIRE(std::string(std::localeconv()->decimal_point) == ",");
  const auto model = small_model::model();
  const auto& price = model->parts().fields[1].embedding;  // boundaries 1 and 2.5
  std::vector<float> out(model->dimension());
  using Fields = std::vector<std::pair<std::string_view, std::string_view>>;
  CHECK(model->metadata_vector(Fields{{"PRICE", "1.5"}}, out) == 1);
  CHECK(out[0] == price.at(1, 0));
  CHECK(model->metadata_vector(Fields{{"PRICE", "1,5"}}, out) == 0);
}

TEST_CASE("numbers are read as the C library reads them in its own locale") {
  for (const char* text :
       {"0", "-0", "1.5", "+1.5", " 7", ".5", "5.", "1e3", "1E+3", "2e-3", "16777217",
        "3.4028235e38", "1e-45", "1e-60", "1e-400", "123456789012345678901234567890", "0.1",
        "-1.17549435e-38", "0.000000000000000000000000000000000000000000001401298464324817"}) {
    CAPTURE(text);
    const auto number = pz::detail::parse_float(text);
    REQUIRE(number);
    CHECK(*number == std::strtof(text, nullptr));
    std::string_view plain = text;
    plain.remove_prefix(plain.find_first_not_of(" +"));
    const auto decimal = pz::detail::parse_decimal(plain);
    REQUIRE(decimal);
    CHECK(static_cast<float>(*decimal) == std::strtof(text, nullptr));
  }
  for (const char* text : {"",
                           " ",
                           "+",
                           "-",
                           ".",
                           "e5",
                           "1e",
                           "1e+",
                           "1.5x",
                           "1,5",
                           "+-1",
                           "--1",
                           "1e99999999999",
                           "1e39",
                           "-1e39",
                           "1e400",
                           "nan",
                           "inf",
                           "1 ",
                           "0x10"}) {
    CAPTURE(text);
    CHECK_FALSE(pz::detail::parse_float(text));
  }
  small_model::Random random{9};
  for (int i = 0; i < 100'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
    if (!std::isfinite(value)) continue;
    std::array<char, 40> text;
    std::snprintf(text.data(), text.size(), "%.9g", static_cast<double>(value));
    REQUIRE(pz::detail::parse_float(text.data()) == value);
    REQUIRE(static_cast<float>(*pz::detail::parse_decimal(text.data())) == value);
  }
}

TEST_CASE("a model may be as wide as its limits say, gates of a GRU three times as wide") {
  pz::ModelParts parts = small_model::parts({.items = 5, .dimension = 2, .hidden = 1400});
  using Kind = pz::EncoderOp::Kind;
  parts.operations = {{Kind::embed_sum}, {Kind::gru}, {Kind::linear}};
  parts.weights = {pz::Matrix::zeros(4200, 2), pz::Matrix::zeros(4200, 1400),
                   pz::Matrix::zeros(1, 4200), pz::Matrix::zeros(1, 4200),
                   pz::Matrix::zeros(2, 1400), pz::Matrix::zeros(1, 2)};
  REQUIRE(pz::Model::from_parts(parts));
  const auto file = pz::write_model(parts, {.zstd_level = 1});
  REQUIRE(file);
  CHECK(pz::read_model(*file));
  const pz::LoadLimits narrow{.dimension = 1399}, wide{.dimension = 1400};
  CHECK(pz::Model::from_parts(parts, wide));
  CHECK(pz::read_model(*file, {.limits = wide}));
  const auto refused = pz::Model::from_parts(parts, narrow);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == pz::Errc::limit);
  const auto unwritten = pz::write_model(parts, {}, narrow);
  REQUIRE_FALSE(unwritten);
  CHECK(unwritten.error().code == pz::Errc::limit);
  const auto unread = pz::read_model(*file, {.limits = narrow});
  REQUIRE_FALSE(unread);
  CHECK(unread.error().code == pz::Errc::limit);
}

TEST_CASE("recurrences that let a state grow are refused, those that keep it are not") {
  using Kind = pz::EncoderOp::Kind;
  const auto with = [](Kind kind, std::vector<float> recurrent) {
    const std::size_t d = recurrent.size();
    pz::ModelParts parts = small_model::parts({.items = 5, .dimension = d});
    parts.operations = {{Kind::embed_sum}, {kind}};
    parts.weights = {pz::Matrix::zeros(1, d)};
    parts.weights[0].set_row(0, recurrent);
    if (kind == Kind::lru) parts.weights.push_back(pz::Matrix::zeros(d, d));
    parts.weights.push_back(pz::Matrix::zeros(1, d));
    return pz::Model::from_parts(std::move(parts));
  };
  CHECK(with(Kind::decay, {1, -1, 0.5f, 1.0005f}));
  CHECK_FALSE(with(Kind::decay, {1, 1, 1, 1.002f}));
  CHECK_FALSE(with(Kind::decay, {-1.01f, 0, 0, 0}));
  CHECK(with(Kind::lru, {0.6f, 1, 0.8f, 0}));  // 0.6 + 0.8 i and 1
  CHECK_FALSE(with(Kind::lru, {0.6f, 0, 0.9f, 0}));
  const auto refused = with(Kind::lru, {0, 0.8f, 0, 0.61f});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().message.find("lru") != std::string::npos);
}

TEST_CASE("values over 1e18 are refused by name, whatever their form") {
  pz::ModelParts parts = small_model::parts();
  parts.item_vectors.f32()[3] = 1e18f;
  CHECK(pz::Model::from_parts(parts));
  const auto refuse = [](pz::ModelParts odd, const char* what) {
    const auto model = pz::Model::from_parts(std::move(odd));
    REQUIRE_FALSE(model);
    CHECK(model.error().message.find(what) != std::string::npos);
  };
  parts.item_vectors.f32()[3] = -2e18f;
  refuse(parts, "IVEC");
  parts = small_model::quantised(small_model::parts());
  parts.event_type_embedding.scales()[0] = 1e17f;
  refuse(parts, "EVTE");
  parts = small_model::parts();
  parts.biases[0] = 1.1e18f;
  refuse(parts, "BIAS");
  parts = small_model::parts();
  parts.weights[3].f32()[0] = 1e30f;
  refuse(parts, "ENCW");
}

TEST_CASE("operations, activations and their shapes have names") {
  using Kind = pz::EncoderOp::Kind;
  CHECK(pz::name(Kind::embed_sum) == "embed_sum");
  CHECK(pz::name(Kind::decay) == "decay");
  CHECK(pz::name(Kind{99}) == "unknown");
  CHECK(pz::name(pz::Activation::last) == "gelu");
  const auto gru = pz::shape_of({Kind::gru}, 7, {15, 7});
  REQUIRE(gru);
  CHECK(gru->outputs == 5);
  CHECK(gru->state == 5);
  CHECK(gru->weight_count == 4);
  CHECK(gru->weights[1] == pz::OpShape::Weight{15, 5});
  CHECK_FALSE(pz::shape_of({Kind::gru, pz::GruForm::all + 1}, 7, {15, 7}));
  CHECK_FALSE(pz::shape_of({Kind::activation, 5}, 7, {}));
  CHECK_FALSE(pz::shape_of({Kind{0}}, 7, {}));
}

TEST_CASE("items are found by id") {
  const auto model = small_model::model({.items = 1000});
  CHECK(model->item_count() == 1000);
  for (std::uint32_t i = 0; i < 1000; ++i) REQUIRE(model->find_item(model->item_id(i)) == i);
  CHECK_FALSE(model->find_item("i1000").has_value());
  CHECK_FALSE(model->find_item("").has_value());
}

}  // namespace model_tests
