#include "data/columns.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <set>

#include "command/command.hpp"
#include "command/json.hpp"
#include "data/fields.hpp"

namespace personalize::tools {
namespace columns {

constexpr std::size_t numeric_buckets = 16;

std::optional<float> number_in(std::string_view text) {
  const auto value = read_number(text);
  // A NaN fails the comparison.
  if (!value || !(std::abs(*value) <= std::numeric_limits<float>::max())) return std::nullopt;
  return static_cast<float>(*value);
}

// "1.234,50" with a decimal point; nothing where the text is not written with a decimal comma.
std::optional<std::string> decimal_point(std::string_view text) {
  const std::size_t comma = text.find(',');
  if (comma == text.npos || text.find_first_not_of("0123456789", comma + 1) != text.npos)
    return std::nullopt;
  std::string number;
  for (std::size_t i = 0; i < comma; ++i)
    if (text[i] != '.')
      number += text[i];
    else if ((comma - i) % 4 != 0)  // points part thousands
      return std::nullopt;
  return number + '.' + std::string(text.substr(comma + 1));
}

bool one_of(std::string_view text, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), lower_case(text)) != words.end();
}

// What programs write for a value that is not there. In a column of numbers more words mean it.
bool missing(std::string_view text) {
  return text.size() <= 4 &&
         one_of(text, {"", "nan", "-nan", "null", "<na>", "#n/a", "\\n", "nat"});
}
bool missing_number(std::string_view text) {
  return missing(text) || (text.size() <= 7 && one_of(text, {"na", "n/a", "none", "-", "--", "?",
                                                             ".", "missing", "unknown"}));
}

// The words of the name, in upper case: {"CATEGORY", "ID"} of "categoryId".
std::vector<std::string> words_of(std::string_view name) {
  std::vector<std::string> words(1);
  bool lower_before = false;
  for (const char c : name) {
    const bool lower = c >= 'a' && c <= 'z', upper = c >= 'A' && c <= 'Z';
    const bool part = !lower && !upper && !(c >= '0' && c <= '9');
    if ((part || (upper && lower_before)) && !words.back().empty()) words.emplace_back();
    if (!part) words.back() += lower ? static_cast<char>(c - 'a' + 'A') : c;
    lower_before = lower;
  }
  return words;
}

// Whether whole numbers under this name stand for things, not for amounts.
bool names_codes(std::string_view name) {
  static constexpr std::array<std::string_view, 22> codes{
      "ID",    "IDS",    "CODE",  "CODES",      "KEY",   "CATEGORY", "CATEGORIES", "CAT",
      "GENRE", "GENRES", "BRAND", "TYPE",       "CLASS", "GROUP",    "CLUSTER",    "SEGMENT",
      "TAG",   "TAGS",   "LABEL", "DEPARTMENT", "ZIP",   "SECTION"};
  for (const std::string& word : words_of(name))
    if (std::find(codes.begin(), codes.end(), word) != codes.end()) return true;
  return false;
}

// Whether the name is one that Amazon Personalize reserves for items of that kind.
bool reserved(std::string_view name, ColumnKind kind) {
  switch (kind) {
    case ColumnKind::categorical:
      return one_of(name,
                    {"category_l1", "category_l2", "category_l3", "genres", "genre_l2", "genre_l3",
                     "content_owner", "content_classification", "age_group", "adult", "gender"});
    case ColumnKind::numeric:
      return one_of(name, {"price", "duration", "average_rating"});
    case ColumnKind::text:
      return one_of(name, {"product_description"});
    default:
      return false;
  }
}

template <class Function>
void for_each_part(std::string_view value, Function part) {
  for (std::size_t begin = 0; begin <= value.size();) {
    const std::size_t end = std::min(value.find('|', begin), value.size());
    const std::string_view text = trimmed(value.substr(begin, end - begin));
    if (!text.empty()) part(text);
    begin = end + 1;
  }
}

// A number with a sign or a word beside it, such as "$12.99" and "12 kg".
bool has_unit(std::string_view text) {
  constexpr std::string_view digits = "0123456789",
                             letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const std::size_t first = text.find_first_of(digits), last = text.find_last_of(digits);
  if (first == text.npos ||
      text.substr(first, last + 1 - first).find_first_not_of("0123456789.,") != text.npos)
    return false;
  const std::string_view before = text.substr(0, first), after = text.substr(last + 1);
  // Letters at a number without a blank are a code's.
  if (before.find_last_of(letters) == before.size() - 1 && !before.empty()) return false;
  if (after.find_first_of(letters) == 0) return false;
  constexpr std::size_t longest = 4;
  return before.size() <= longest && after.size() <= longest && before.size() + after.size() > 0 &&
         before != "-";
}

struct Numbers {
  std::vector<std::pair<std::uint32_t, float>> values;
  std::vector<const std::pair<std::uint32_t, std::string>*> others;  // what is no number
  std::size_t distinct = 0, missing = 0;
  bool whole = true, commas = false, leading_zeros = false;
};

Numbers numbers_of(const RawColumn& raw) {
  Numbers numbers;
  std::size_t points = 0, commas = 0, thousands = 0;
  for (const auto& [item, value] : raw.values) {
    if (value.find(',') == value.npos) {
      points += value.find('.') != value.npos ? 1 : 0;
    } else if (const auto number = decimal_point(value); number && number_in(*number)) {
      ++commas;
      thousands += value.size() - value.find(',') == 4 ? 1 : 0;
    }
  }
  // "1,234" is a thousand in one half of the world: three digits behind every comma say neither.
  numbers.commas = commas > 0 && thousands < commas && points == 0;
  std::set<float> distinct;
  for (const auto& each : raw.values) {
    const std::string_view text = trimmed(each.second);
    auto number = number_in(text);
    if (!number && numbers.commas)
      if (const auto pointed = decimal_point(text)) number = number_in(*pointed);
    if (!number) {
      if (missing_number(text))
        ++numbers.missing;
      else
        numbers.others.push_back(&each);
      continue;
    }
    numbers.values.emplace_back(each.first, *number);
    if (distinct.size() <= numeric_buckets) distinct.insert(*number);
    numbers.whole = numbers.whole && text.find_first_not_of("0123456789-") == text.npos;
    numbers.leading_zeros =
        numbers.leading_zeros || (text.size() > 1 && text[0] == '0' &&
                                  text.find('.') == text.npos && text.find(',') == text.npos);
  }
  numbers.distinct = distinct.size();
  return numbers;
}

bool row_numbers(const Numbers& numbers, std::size_t rows) {
  constexpr std::size_t enough = 8;  // fewer rise by one now and then
  if (rows < enough || numbers.values.size() != rows || !numbers.whole) return false;
  for (std::size_t i = 1; i < rows; ++i)
    if (numbers.values[i].second != numbers.values[i - 1].second + 1) return false;
  return true;
}

std::string left_out(const RawColumn& raw, const std::string& reason) {
  return raw.shown + " (left out: " + reason + ")";
}

std::string add_numeric(const RawColumn& raw, const Numbers& numbers, std::size_t rows,
                        const StringTable& ids, std::vector<MetadataColumn>& metadata) {
  if (numbers.values.empty()) return left_out(raw, "no value is a number");
  MetadataColumn column;
  column.name = raw.name;
  column.numeric = true;
  column.values.resize(ids.size());
  std::vector<float> sorted;
  for (const auto& [item, value] : numbers.values) sorted.push_back(value);
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t b = 1; b < numeric_buckets; ++b) {
    const float boundary = sorted[b * sorted.size() / numeric_buckets];
    if (column.boundaries.empty() || boundary > column.boundaries.back())
      column.boundaries.push_back(boundary);
  }
  for (const auto& [item, value] : numbers.values) {
    const auto at = std::upper_bound(column.boundaries.begin(), column.boundaries.end(), value);
    column.values[item] = {static_cast<std::uint32_t>(at - column.boundaries.begin())};
  }
  metadata.push_back(std::move(column));
  std::string said = raw.shown + " (numeric";
  if (numbers.commas) said += ", decimal commas";
  if (const std::size_t none = rows - numbers.values.size() - numbers.others.size(); none > 0)
    said += ", " + std::to_string(none) + " without a value";
  if (!numbers.others.empty()) {
    const auto& [item, value] = *numbers.others.front();
    said += ", " + count_of(numbers.others.size(), "value") + " left out as no number: '" +
            printable(value.substr(0, 40)) + "' of item " + printable(ids[item]) +
            (numbers.others.size() > 1 ? " is the first" : "");
  }
  return said + ")";
}

}  // namespace columns

std::string add_column(RawColumn&& raw, const std::optional<ColumnChoices::Choice>& choice,
                       std::size_t rows, const StringTable& ids,
                       std::vector<MetadataColumn>& metadata) {
  using namespace columns;
  if (choice && choice->kind == ColumnKind::ignored) return left_out(raw, choice->reason);
  if (choice && choice->kind == ColumnKind::plain)
    return left_out(raw, "a string that the schema calls neither categorical nor textual");
  if (choice && choice->kind == ColumnKind::text)
    return left_out(raw, "text, which is not learnt from");
  const Numbers numbers = numbers_of(raw);
  if (raw.name.empty() || raw.name.starts_with("Unnamed: "))
    return left_out(
        raw, row_numbers(numbers, rows) ? "row numbers without a name" : "a column without a name");
  if (choice && choice->kind == ColumnKind::numeric)
    return add_numeric(raw, numbers, rows, ids, metadata);

  std::set<std::string_view> distinct, parts;
  std::size_t given = 0, part_count = 0, unusable = 0, units = 0;
  for (const auto& [item, value] : raw.values) {
    if (missing(trimmed(value))) continue;
    ++given;
    units += has_unit(value) ? 1 : 0;
    distinct.insert(value);
    for_each_part(value, [&](std::string_view part) {
      if (missing(part)) return;
      if (part.size() > max_id_bytes || !detail::valid_id(part)) {
        ++unusable;
        return;
      }
      ++part_count;
      parts.insert(part);
    });
  }
  if (parts.empty() && unusable == 0) return left_out(raw, "no values");
  bool partly_numbers = false;
  const char* unit_hint = "";
  if (!choice) {
    const bool category = reserved(raw.name, ColumnKind::categorical),
               number = reserved(raw.name, ColumnKind::numeric);
    if (reserved(raw.name, ColumnKind::text))
      return left_out(raw, "text, by Amazon's name; it is not learnt from");
    if (distinct.size() == 1 && given == rows && rows > 1)
      return left_out(raw, "the same value in every row");
    if (!category && !number && row_numbers(numbers, rows))
      return left_out(raw, "row numbers; --numeric keeps them");
    const std::size_t counted = numbers.values.size() + numbers.others.size();
    const bool mostly = numbers.values.size() * 10 >= counted * 9;
    const bool many = numbers.distinct > numeric_buckets;
    const bool codes = numbers.whole && (names_codes(raw.name) || numbers.leading_zeros);
    if (mostly && !category && (number || (many && !codes)))
      return add_numeric(raw, numbers, rows, ids, metadata);
    partly_numbers = many && !mostly && numbers.values.size() * 2 >= counted;
    unit_hint =
        units * 2 > given ? "; they look like numbers with a unit: write the numbers alone" : "";
    if (distinct.size() > 1000 && distinct.size() * 5 > ids.size() && !codes)
      return left_out(raw, "free text: " + std::to_string(distinct.size()) +
                               " distinct values for " + std::to_string(ids.size()) + " items" +
                               unit_hint + "; --categorical keeps them");
  }
  MetadataColumn column;
  column.name = raw.name;
  column.values.resize(ids.size());
  for (const auto& [item, value] : raw.values)
    for_each_part(value, [&, &values = column.values[item]](std::string_view part) {
      if (missing(part) || part.size() > max_id_bytes || !detail::valid_id(part)) return;
      values.push_back(number_of(column.vocabulary, part));
    });
  std::string said = raw.shown + " (categorical, " + count_of(column.vocabulary.size(), "value");
  if (part_count > 1 && parts.size() == part_count) said += ", each of one item";
  if (rows > given) said += ", " + std::to_string(rows - given) + " without one";
  if (partly_numbers)
    said += ", of which some are numbers: --numeric leaves out " +
            count_of(numbers.others.size(), "value") + " like '" +
            printable(numbers.others.front()->second.substr(0, 40)) + "'";
  if (unusable > 0)
    said +=
        ", " + count_of(unusable, "value") + " left out with a control character or over 256 bytes";
  said += unit_hint;
  said += ")";
  if (column.vocabulary.empty()) return said;
  metadata.push_back(std::move(column));
  return said;
}

ColumnChoices::ColumnChoices(const ColumnOptions& options) {
  const std::pair<ColumnKind, std::pair<const char*, const std::vector<std::string>*>> kinds[] = {
      {ColumnKind::categorical, {"--categorical", &options.categorical}},
      {ColumnKind::numeric, {"--numeric", &options.numeric}},
      {ColumnKind::text, {"--text", &options.text}},
      {ColumnKind::ignored, {"--ignore", &options.ignore}}};
  for (const auto& [kind, option] : kinds)
    for (const std::string& name : *option.second) {
      for (const Named& other : named_)
        if (letters_of(other.name) == letters_of(name) && other.kind != kind)
          throw Usage("column " + printable(name) + " is given to " + other.option + " and to " +
                      option.first);
      named_.push_back({name, option.first, kind});
    }
  for (const std::string& path : options.schemas) read_schema(path);
}

void ColumnChoices::read_schema(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Failure(path + ": cannot open");
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const nlohmann::json json = parse_json(text, path);
  const auto wrong = [&](const std::string& what) {
    throw Failure(path + ": " + what +
                  "; a schema is Amazon Personalize's Avro JSON, as in "
                  "{\"type\": \"record\", \"name\": \"Items\", \"fields\": [{\"name\": "
                  "\"ITEM_ID\", \"type\": \"string\"}, ...]}");
  };
  if (!json.is_object() || !json.contains("fields") || !json["fields"].is_array())
    wrong("has no list of fields");
  Schema schema{path, {}};
  for (const auto& field : json["fields"]) {
    if (!field.is_object() || !field.contains("name") || !field["name"].is_string() ||
        !field.contains("type"))
      wrong("a field has no name or no type");
    const std::string name = field["name"].get<std::string>();
    std::string type;  // of a union, the one that is not null
    for (const auto& each :
         field["type"].is_array() ? field["type"] : nlohmann::json::array({field["type"]})) {
      if (!each.is_string()) wrong("field " + printable(name) + " has no simple type");
      if (each.get<std::string>() != "null") type = each.get<std::string>();
    }
    const auto flag = [&](const char* key) {
      if (!field.contains(key)) return false;
      if (!field[key].is_boolean())
        wrong("field " + printable(name) + ": '" + key + "' is neither true nor false");
      return field[key].get<bool>();
    };
    Choice choice{ColumnKind::ignored, ""};
    if (type == "string" && flag("categorical"))
      choice.kind = ColumnKind::categorical;
    else if (type == "string" && flag("textual"))
      choice.kind = ColumnKind::text;
    else if (type == "boolean")
      choice.kind = ColumnKind::categorical;
    else if (type == "int" || type == "long" || type == "float" || type == "double")
      choice.kind = ColumnKind::numeric;
    else if (type == "string")
      choice.kind = ColumnKind::plain;
    else
      wrong("field " + printable(name) + " has the type '" + printable(type) + "'");
    if (!schema.fields.emplace(name, choice).second)
      wrong("field " + printable(name) + " stands twice");
  }
  const bool users = schema.fields.contains("USER_ID"), items = schema.fields.contains("ITEM_ID");
  if (!items) wrong(users ? "describes users, whose file is not read" : "has no field ITEM_ID");
  auto& place = schemas_[static_cast<std::size_t>(users ? File::interactions : File::items)];
  if (place) throw Failure(path + ": describes the same file as " + place->path);
  place = std::move(schema);
}

std::optional<ColumnChoices::Choice> ColumnChoices::of(File file, const std::string& column) const {
  for (const Named& named : named_)
    if (!column.empty() && letters_of(named.name) == letters_of(column))
      return Choice{named.kind, "--ignore"};
  const auto& schema = schemas_[static_cast<std::size_t>(file)];
  if (!schema) return std::nullopt;
  const auto field = schema->fields.find(column);
  if (field != schema->fields.end()) return field->second;
  return Choice{ColumnKind::ignored, "not in the schema"};
}

namespace columns {

std::string names_of(const CsvReader& reader) {
  std::string names = reader.name() + " has";
  for (std::size_t c = 0; c < reader.columns().size(); ++c)
    names += (c == 0 ? " " : ", ") + printable(reader.columns()[c]);
  return names.size() > 400 ? names.substr(0, 400) + "..." : names;
}

}  // namespace columns

void ColumnChoices::check_schema(File file, const CsvReader& reader) const {
  const auto& schema = schemas_[static_cast<std::size_t>(file)];
  if (!schema) return;
  for (const auto& [name, choice] : schema->fields)
    if (std::find(reader.columns().begin(), reader.columns().end(), name) == reader.columns().end())
      throw Failure(schema->path + ": field " + printable(name) +
                    " is no column: " + columns::names_of(reader));
}

void ColumnChoices::check_names(const CsvReader& interactions, const CsvReader* items) const {
  for (const Named& named : named_) {
    const bool ignored = named.kind == ColumnKind::ignored;
    const auto is_column_of = [&](const CsvReader& reader) {
      return std::any_of(reader.columns().begin(), reader.columns().end(),
                         [&](const std::string& column) {
                           return !column.empty() && letters_of(column) == letters_of(named.name);
                         });
    };
    const std::string option = named.option + " " + printable(named.name) + ": ";
    if (!(items && is_column_of(*items)) && !(ignored && is_column_of(interactions)))
      throw Failure(option + (ignored ? "no such column: " : "no such column of the items: ") +
                    (ignored ? columns::names_of(interactions) + (items ? "; " : "") : "") +
                    (items     ? columns::names_of(*items)
                     : ignored ? ""
                               : "--items is not given"));
    for (const char* const needed : {"USER_ID", "ITEM_ID", "TIMESTAMP"})
      for (const CsvReader* const reader : {&interactions, items})
        if (const auto column = reader ? reader->column(needed) : std::nullopt;
            column && letters_of(reader->columns()[*column]) == letters_of(named.name) &&
            (reader == &interactions || needed == std::string_view("ITEM_ID")))
          throw Failure(option + "the column is read as " + needed + " and no metadata");
  }
}

}  // namespace personalize::tools
