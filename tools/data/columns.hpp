// What the metadata columns of an items file are: told by options and schemas, else guessed and
// said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/csv.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {

// A usable metadata column of the items file.
struct MetadataColumn {
  std::string name;
  bool numeric = false;
  StringTable vocabulary;         // categorical: values in order of first appearance
  std::vector<float> boundaries;  // numeric: ascending; bucket = number of boundaries <= value
  std::vector<std::vector<std::uint32_t>> values;  // per item: vocabulary or bucket indices
};

enum class ColumnKind {
  categorical,
  numeric,
  text,
  plain,  // a string that a schema calls neither categorical nor textual: for filters alone
  ignored,
};

// Columns that the user names, and Avro schemas in Amazon Personalize's JSON.
struct ColumnOptions {
  std::vector<std::string> categorical = {}, numeric = {}, text = {}, ignore = {}, schemas = {};
};

class ColumnChoices {
 public:
  // Throws Failure: a schema that cannot be read; Usage: a column that is named for two kinds.
  explicit ColumnChoices(const ColumnOptions& options);

  enum class File { interactions, items };
  // What was chosen for the column; nothing where it is to be guessed. With a schema, columns that
  // it does not have are ignored.
  struct Choice {
    ColumnKind kind;
    std::string reason;  // of an ignored one
  };
  std::optional<Choice> of(File file, const std::string& column) const;
  // Throws Failure where the schema for the file has a field that is no column.
  void check_schema(File file, const CsvReader& reader) const;
  // Throws Failure where an option names a column that is not there (of the items, but --ignore
  // also of the interactions), or an id or the time.
  void check_names(const CsvReader& interactions, const CsvReader* items) const;

 private:
  void read_schema(const std::string& path);
  struct Named {
    std::string name, option;
    ColumnKind kind;
  };
  std::vector<Named> named_;
  struct Schema {
    std::string path;
    std::map<std::string, Choice> fields;  // by name
  };
  std::optional<Schema> schemas_[2];  // by File
};

// Whole-field values of one column, by item, in the order of the file.
struct RawColumn {
  std::string name;
  std::string shown;  // in messages
  std::vector<std::pair<std::uint32_t, std::string>> values;
};

// Adds the column to `metadata` unless it is left out, and returns what is said of it:
// "GENRE (categorical, 8 values)". `rows`: of the file; `items`: of the data set, whose ids are
// `ids`.
std::string add_column(RawColumn&& raw, const std::optional<ColumnChoices::Choice>& choice,
                       std::size_t rows, const StringTable& ids,
                       std::vector<MetadataColumn>& metadata);

}  // namespace personalize::tools
