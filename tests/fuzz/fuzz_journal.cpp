// A journal from anywhere, behind a sound state: the folder is refused, or it serves and keeps
// every promise. The input is a journal's records, which are numbered and sealed here, so that what
// they say is reached.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "journal_records.hpp"
#include "small_shop.hpp"

namespace fs = std::filesystem;
namespace pz = personalize;
using journal_records::Record;
using promises::require;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// What every folder begins with.
struct Start {
  std::string state, header;
  pz::detail::JournalHeader of;

  Start() {
    const small_shop::Folder folder;
    auto shop = pz::Recommender::open(folder.path(), small_shop::model(), small_shop::options());
    require(shop.has_value(), "a new folder opens");
    small_shop::fill(*shop);
    require(shop->save().has_value(), "a state is saved");
    state = read(folder.path() + "/state-000000000002.pzs");
    const std::string journal = folder.path() + "/journal-000000000002.pzj";
    header = read(journal).substr(0, 64);
    const auto peeked = pz::detail::peek_journal_header(journal, {});
    require(peeked.has_value() && !state.empty(), "its files are there");
    of = *peeked;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Start start;
  static const small_shop::Folder folder;
  const std::string& path = folder.path();
  for (const auto& entry : fs::directory_iterator(path)) fs::remove(entry.path());
  const auto records = journal_records::take_apart(std::as_bytes(std::span(data, size)));
  const auto bytes =
      journal_records::put_together(records, start.of.first_sequence, start.of.seed());
  std::ofstream(path + "/state-000000000002.pzs", std::ios::binary) << start.state;
  std::ofstream(path + "/journal-000000000002.pzj", std::ios::binary)
      << start.header
      << std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  {
    auto shop = pz::Recommender::open(path, small_shop::model(), small_shop::options());
    if (!shop) {
      require(shop.error().message.starts_with(path), "an error names the file");
      return 0;
    }
    require(shop->recovery().torn == 0, "nothing is torn");
    small_shop::use(*shop);
    if (size % 4 == 0) require(shop->save().has_value(), "a state is saved");
  }
  auto again = pz::Recommender::open(path, small_shop::model(), small_shop::options());
  require(again.has_value(), "what was opened once opens again");
  small_shop::use(*again);
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  small_model::Random random(seed);
  auto records = journal_records::take_apart(std::as_bytes(std::span(data, size)));
  if (records.empty()) records.push_back({});
  const auto any = [&] { return random.below(static_cast<std::uint32_t>(records.size())); };
  for (std::uint32_t n = 1 + random.below(3); n > 0; --n) {
    Record& record = records[any()];
    switch (random.below(8)) {
      case 0:
        record.type = random.below(18);
        break;
      case 1:
        std::swap(record, records[any()]);
        break;
      case 2:
        records.insert(records.begin() + any(), Record(record));
        break;
      case 3:
        if (records.size() > 1) records.erase(records.begin() + any());
        break;
      case 4:
        if (record.payload.size() >= 8) {
          const std::size_t at =
              random.below(static_cast<std::uint32_t>(record.payload.size() - 7));
          const std::uint64_t values[] = {0,     1,          2,          8,          0xffffffff,
                                          ~0ull, 1ull << 63, 1ull << 62, 0x7fc00000, 0x7f7fffff};
          std::memcpy(record.payload.data() + at, &values[random.below(10)],
                      std::size_t{1} << random.below(4));
        }
        break;
      default: {
        const std::size_t before = record.payload.size();
        record.payload.resize(before + 32);
        record.payload.resize(LLVMFuzzerMutate(
            reinterpret_cast<std::uint8_t*>(record.payload.data()), before, record.payload.size()));
      }
    }
  }
  const auto bytes = journal_records::put_together(records, 0, 0);
  if (bytes.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}
