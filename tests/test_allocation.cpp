// What takes memory, how much, and what happens where there is none. A program of its own: it
// replaces operator new.
#include <doctest/doctest.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace pz = personalize;

namespace {

struct Allocations {
  std::atomic<std::int64_t> count{0}, bytes{0}, peak{0};
  std::atomic<std::int64_t> blocks{0};                 // bytes as a usual allocator gives them
  std::atomic<std::int64_t> fail_at{0};                // the how-manieth from now fails; 0: none
  std::atomic<std::span<const char>*> watch{nullptr};  // is set to every block of 64 KiB or more

  void reset_peak() { peak = bytes.load(); }
};
Allocations allocations;

// Of a block of so many bytes glibc takes 8 more, a multiple of 16 and at least 32.
std::int64_t block_of(std::size_t size) noexcept {
  return static_cast<std::int64_t>(std::max<std::size_t>((size + 8 + 15) / 16 * 16, 32));
}

// Counts one more; false where it is to fail.
bool next() noexcept {
  ++allocations.count;
  std::int64_t left = allocations.fail_at;
  while (left > 0 && !allocations.fail_at.compare_exchange_weak(left, left - 1)) {
  }
  return left != 1;
}

void given(std::size_t size, std::int64_t block) noexcept {
  const std::int64_t now = allocations.bytes += static_cast<std::int64_t>(size);
  allocations.blocks += block;
  std::int64_t peak = allocations.peak;
  while (peak < now && !allocations.peak.compare_exchange_weak(peak, now)) {
  }
}

// The size stands in front, in as many bytes as the alignment is.
void* allocate(std::size_t size, std::size_t alignment) {
  if (!next()) throw std::bad_alloc();
  const std::size_t whole = (size + 2 * alignment - 1) / alignment * alignment;
  auto* p = static_cast<char*>(std::aligned_alloc(alignment, whole));
  if (!p) throw std::bad_alloc();
  *reinterpret_cast<std::size_t*>(p) = size;
  given(size, block_of(size));
  if (auto* watch = allocations.watch.load(); watch && size >= 1 << 16)
    *watch = {p + alignment, size};
  return p + alignment;
}

void release(void* pointer, std::size_t alignment) noexcept {
  if (!pointer) return;
  auto* p = static_cast<char*>(pointer) - alignment;
  const std::size_t size = *reinterpret_cast<std::size_t*>(p);
  allocations.bytes -= static_cast<std::int64_t>(size);
  allocations.blocks -= block_of(size);
  std::free(p);
}

constexpr std::size_t usual = 16;

}  // namespace

void* operator new(std::size_t size) { return allocate(size, usual); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}

// The library asks this way only where it can do without (std::stable_sort).
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  const std::int64_t fail_at = allocations.fail_at.exchange(0);
  void* p = operator new(size);
  allocations.fail_at = fail_at;
  return p;
}

// What is large the library maps. The system's own allocator does not come by here.
#if defined(__linux__)
extern "C" {
void* mmap(void* at, std::size_t size, int protection, int flags, int file, off_t offset) noexcept {
  const bool ours = file < 0 && protection == (PROT_READ | PROT_WRITE);
  if (ours && !next()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  const long address = ::syscall(SYS_mmap, at, size, protection, flags, file, offset);
  if (ours && address != -1) {
    given(size, static_cast<std::int64_t>(size));
    if (auto* watch = allocations.watch.load()) *watch = {reinterpret_cast<char*>(address), size};
  }
  return reinterpret_cast<void*>(address);
}
int munmap(void* at, std::size_t size) noexcept {
  allocations.bytes -= static_cast<std::int64_t>(size);
  allocations.blocks -= static_cast<std::int64_t>(size);
  return static_cast<int>(::syscall(SYS_munmap, at, size));
}
}
#endif

// The address sanitizer's own of these would not call those above.
void* operator new[](std::size_t size) { return allocate(size, usual); }
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}

void operator delete(void* pointer) noexcept { release(pointer, usual); }
void operator delete(void* pointer, std::align_val_t alignment) noexcept {
  release(pointer, static_cast<std::size_t>(alignment));
}

void operator delete(void* pointer, std::size_t) noexcept { operator delete(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t alignment) noexcept {
  operator delete(pointer, alignment);
}

void operator delete[](void* pointer) noexcept { release(pointer, usual); }
void operator delete[](void* pointer, std::align_val_t alignment) noexcept {
  release(pointer, static_cast<std::size_t>(alignment));
}
void operator delete[](void* pointer, std::size_t) noexcept { release(pointer, usual); }
void operator delete[](void* pointer, std::size_t, std::align_val_t alignment) noexcept {
  release(pointer, static_cast<std::size_t>(alignment));
}

namespace {

constexpr std::int64_t start = 1'700'000'000;

pz::Recommender shop_of(const std::shared_ptr<const pz::Model>& model,
                        pz::RecommenderOptions options = {}) {
  options.recommendation_key = {1, 2};
  auto shop = pz::Recommender::create(model, options);
  REQUIRE(shop);
  return std::move(*shop);
}

// A model whose items are young enough to be explored.
std::shared_ptr<const pz::Model> young_model() {
  auto parts = small_model::quantised(small_model::parts({.items = 60}));
  for (std::size_t i = 0; i < parts.statistics.size(); ++i) {
    parts.statistics[i].creation_timestamp = start - 86'400;
    parts.statistics[i].last_timestamp = start;
    if (i % 2 == 0) parts.statistics[i].interactions = 0;
  }
  auto model = pz::Model::from_parts(std::move(parts));
  REQUIRE(model);
  return *model;
}

void same_slate(const pz::Slate& a, const pz::Slate& b) {
  REQUIRE(a.items.size() == b.items.size());
  for (std::size_t i = 0; i < a.items.size(); ++i) {
    REQUIRE(a.items[i].item == b.items[i].item);
    REQUIRE(a.items[i].score == b.items[i].score);
    REQUIRE(a.items[i].propensity == b.items[i].propensity);
  }
}

// Within 2 %.
void agree(double told, std::int64_t blocks) {
  const auto given = static_cast<double>(blocks);
  INFO("given " << given << ", told " << told);
  CHECK(told >= 0.98 * given);
  CHECK(told <= 1.02 * given);
}

std::size_t files_in(const std::filesystem::path& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder),
                                                std::filesystem::directory_iterator()));
}

// Lets the first, the second, ... allocation of `call` fail until it gets through without; returns
// how many failed. `call` returns a Result; after each failure, check() is called.
template <class Call, class Check>
int fail_every_allocation(Call call, Check check) {
  for (int n = 1;; ++n) {
    allocations.fail_at = n;
    const auto result = call();
    const bool failed = allocations.fail_at == 0;
    allocations.fail_at = 0;
    if (!failed) {
      REQUIRE(result);
      return n - 1;
    }
    REQUIRE_FALSE(result);
    REQUIRE(result.error().code == pz::Errc::out_of_memory);
    check();
  }
}

}  // namespace

TEST_CASE("events, slates and rankings of a known user take no memory once warm") {
  const auto model = young_model();
  for (const float weight : {0.0f, 0.3f, 1.0f}) {
    for (const bool feedback : {true, false}) {
      CAPTURE(weight);
      CAPTURE(feedback);
      // So small that the log of slates and the user's history have gone round.
      auto shop = shop_of(model, {.history_length = 40,
                                  .exploration_weight = weight,
                                  .feedback = feedback,
                                  .update_interval = std::chrono::seconds{0},
                                  .remembered_slates = 32});
      const std::string user = "a user whose name does not fit into a short string";
      const std::vector<std::string_view> some{"i3", "i5", "not in the catalogue", "i7"};
      pz::ItemMask eligible(50, true);
      eligible.reset(9);
      pz::Slate slate, ranking;
      std::string event_id(40, 'e');
      std::int64_t now = start;
      const auto round = [&](std::uint32_t r) {
        event_id[0] = static_cast<char>('a' + r % 26);
        event_id[1] = static_cast<char>('a' + r / 26 % 26);
        now += 60;
        bool done = static_cast<bool>(
            shop.record({.user = user,
                         .item = model->item_id(r * 7 % 60),
                         .event_type = r % 2 == 0 ? "click" : "an event type that is unknown here",
                         .timestamp = now,
                         .recommendation_id = slate.id,
                         .event_id = event_id}));
        done = done && shop.record_impression({.user = user, .items = some, .timestamp = now});
        done = done && shop.recommend({.user = user,
                                       .count = 25,
                                       .exclude_interacted = r % 3 == 0,
                                       .eligible = r % 4 == 0 ? &eligible : nullptr,
                                       .timestamp = now},
                                      slate);
        done = done && shop.rank({.user = user, .timestamp = now}, some, ranking);
        if (!slate.items.empty() && !slate.id.empty())
          done = done && shop.record({.user = user,
                                      .item = slate.items[r % slate.items.size()].item,
                                      .timestamp = now,
                                      .recommendation_id = slate.id});
        return done;
      };
      // Every item was seen and ignored: no slate will look through more than this one.
      std::vector<std::string_view> all;
      for (std::uint32_t i = 0; i < model->item_count(); ++i) all.push_back(model->item_id(i));
      REQUIRE(shop.record_impression({.user = user, .items = all, .timestamp = now}));
      for (std::uint32_t r = 0; r < 600; ++r) REQUIRE(round(r));
      const std::int64_t before = allocations.count;
      bool done = true;
      for (std::uint32_t r = 600; r < 900; ++r) done = round(r) && done;
      const std::int64_t taken = allocations.count - before;
      CHECK(done);
      CHECK(taken == 0);
    }
  }
}

TEST_CASE("memory() tells what the allocator gave, part by part") {
  const auto model = young_model();
  std::vector<std::string> users, ids;
  for (int n = 0; n < 400; ++n)
    users.push_back("a user whose id takes a block, no. " + std::to_string(n));
  for (int n = 0; n < 3000; ++n)
    ids.push_back("an item whose id takes a block, no. " + std::to_string(n));
  std::int64_t clock = start;
  const std::int64_t begin = allocations.blocks;
  pz::RecommenderOptions options{
      .update_interval = {}, .slate_log_bytes = 1 << 17, .clock = [&] { return clock; }};
  SUBCASE("as usual") {}
  SUBCASE("with a log and the gates looked up") {
    options.log = [](const pz::LogEntry&) {};
    options.gate_lookup = true;
  }
  auto shop = shop_of(model, options);
  pz::Slate slate;
  std::int64_t before = begin;
  pz::MemoryUse known;
  // What a part has grown by since the last look, beside the allocator's growth.
  const auto grown = [&](auto... parts) {
    const pz::MemoryUse use = shop.memory();
    const std::int64_t blocks = allocations.blocks;
    double told = 0;
    ((told += static_cast<double>(use.*parts) - static_cast<double>(known.*parts)), ...);
    agree(told, blocks - before);
    before = allocations.blocks;
    known = use;
  };
  using Use = pz::MemoryUse;
  const auto all = [&] {
    const auto told = static_cast<double>(shop.memory().total());
    agree(told, allocations.blocks - begin);
  };
  all();
  // Requests' memory.
  REQUIRE(shop.record({.user = users[0], .item = "i1"}));
  REQUIRE(shop.recommend({.user = users[0], .exclude_interacted = true}, slate));
  REQUIRE(shop.record({.user = users[0], .item = "i2", .recommendation_id = slate.id}));
  REQUIRE(shop.update());
  REQUIRE(shop.update());
  slate = {};
  all();
  before = allocations.blocks;
  known = shop.memory();
  for (const std::string& user : users)
    for (int n = 0; n < 40; ++n)
      REQUIRE(shop.record({.user = user, .item = "i" + std::to_string(n)}));
  grown(&Use::users);
  for (const std::string& user : users) {
    const std::string event = "event of " + user;
    REQUIRE(shop.record({.user = users[1], .item = "i3", .event_id = event}));
  }
  grown(&Use::event_ids, &Use::users);
  for (int n = 0; n < 100; ++n) {
    REQUIRE(shop.recommend({.user = users[static_cast<std::size_t>(n)], .count = 20}, slate));
    REQUIRE(shop.record_impression(
        {.user = users[static_cast<std::size_t>(n)], .recommendation_id = slate.id}));
  }
  slate = {};
  grown(&Use::users, &Use::contexts, &Use::slates, &Use::scratch);
  for (const std::string& id : ids) REQUIRE(shop.put_item({.item = id}));
  grown(&Use::pending);
  for (int n = 0; n < 500; ++n)
    REQUIRE(*shop.record(
                {.user = users[2], .item = ids[7], .event_type = "a type that takes a block"}) ==
            pz::Recorded::pending_item);
  grown(&Use::pending, &Use::users);
  // The generation before goes with the second.
  REQUIRE(shop.update());
  REQUIRE(shop.record({.user = users[2], .item = "i1"}));
  REQUIRE(shop.recommend({.user = users[2]}, slate));
  slate = {};
  REQUIRE(shop.update());
  REQUIRE(shop.update());
  all();
  // Many generations, some with corrections, each of which shares pages with those before.
  for (int n = 0; n < 30; ++n) {
    const std::string& user = users[static_cast<std::size_t>(n)];
    REQUIRE(shop.put_item({.item = "one more: " + std::to_string(n)}));
    REQUIRE(shop.recommend({.user = user, .count = 20}, slate));
    REQUIRE(
        shop.record({.user = user, .item = slate.items[3].item, .recommendation_id = slate.id}));
    slate = {};
    clock += 3600;
    REQUIRE(shop.update());
  }
  REQUIRE(shop.update());
  all();
}

TEST_CASE("nothing of a forgotten user's slates is left in memory") {
  std::span<const char> ring;
  allocations.watch = &ring;
  pz::SlateLog log(16, 86'400, {1, 2}, 1 << 17, 4);
  allocations.watch = nullptr;
  REQUIRE(ring.size() >= 1 << 16);
  const auto count = [&](std::string_view bytes) {
    const std::string_view all(ring.data(), ring.size());
    int found = 0;
    for (std::size_t at = all.find(bytes); at != all.npos; at = all.find(bytes, at + 1)) ++found;
    return found;
  };
  const std::array<float, 4> theirs{1.25f, -3.5f, 17.0f, 0.1f}, another{2.5f, 9.0f, 4.0f, 0.3f};
  const auto bytes_of = [](const std::array<float, 4>& query) {
    return std::string_view(reinterpret_cast<const char*>(query.data()), sizeof query);
  };
  std::string id;
  for (const bool mine : {true, false, true}) {
    pz::LoggedSlate slate;
    slate.query.assign(mine ? theirs.begin() : another.begin(),
                       mine ? theirs.end() : another.end());
    slate.picks.resize(3);
    slate.timestamp = start;
    log.add(mine ? "u" : "v", slate, start, id);
  }
  CHECK(count(bytes_of(theirs)) == 2);
  CHECK(count(bytes_of(another)) == 1);
  log.forget("u");
  CHECK(count(bytes_of(theirs)) == 0);
  CHECK(count(bytes_of(another)) == 1);
}

TEST_CASE("memory() tells what a request to a large catalogue takes") {
  const auto model = small_model::model({.items = 300'000, .dimension = 8, .hidden = 8});
  auto shop = shop_of(model, {.update_interval = {}, .clock = [] { return start; }});
  const std::int64_t before = allocations.blocks;
  const std::size_t known = shop.memory().total();
  for (int n = 0; n < 3; ++n) {
    pz::Slate slate;
    REQUIRE(shop.record({.user = "u", .item = "i7"}));
    REQUIRE(shop.recommend({.user = "u", .exclude_interacted = true}, slate));
  }
  const std::int64_t given = allocations.blocks - before;
  REQUIRE(given > 2 * 300'000 / 8);
  agree(static_cast<double>(shop.memory().total() - known), given);
}

TEST_CASE("a model is read into little more than its own memory") {
  const TemporaryFolder folder;
  const std::string path = folder.file("m.pzm");
  constexpr std::int64_t chunk = 1 << 16;
  for (const auto type : {pz::ElementType::i8, pz::ElementType::i4}) {
    // Noise, which does not become smaller: the file is as large as the matrix.
    REQUIRE(pz::save_model(small_model::parts({.items = 60'000, .dimension = 48, .hidden = 16}),
                           path, {.element_type = type, .zstd_level = 1, .chunk_bytes = chunk}));
    for (const unsigned threads : {1u, 3u}) {
      CAPTURE(threads);
      const std::int64_t before = allocations.bytes;
      allocations.reset_peak();
      const auto model = pz::Model::load(path, {.threads = threads});
      REQUIRE(model);
      const std::int64_t final = allocations.bytes - before;
      const std::int64_t beside = allocations.peak - before - final;
      REQUIRE(final > 60'000 * (48 + 4 + 4 + 32));
      // A chunk as stored and one decompressed for each thread, and the table of sections.
      CHECK(beside <= threads * 2 * chunk + 16'384);
    }
  }
}

TEST_CASE("loading survives the failure of any allocation") {
  const TemporaryFolder folder;
  const std::string path = folder.file("n.pzm");
  const auto parts = small_model::parts({.items = 40});
  const pz::WriteOptions options{.element_type = pz::ElementType::i4, .chunk_bytes = 512};
  REQUIRE(pz::save_model(parts, path, options));
  const auto file = pz::write_model(parts, options);
  REQUIRE(file);
  const std::int64_t before = allocations.bytes;
  CHECK(fail_every_allocation([&] { return pz::Model::from_bytes(*file); },
                              [&] { REQUIRE(allocations.bytes == before); }) > 50);
  CHECK(fail_every_allocation([&] { return pz::Model::load(path); },
                              [&] { REQUIRE(allocations.bytes == before); }) > 50);
  CHECK(fail_every_allocation([&] { return pz::Model::load(path, {.threads = 3}); },
                              [&] { REQUIRE(allocations.bytes == before); }) > 50);
}

TEST_CASE("a state file takes memory for its largest section and two chunks, whatever its size") {
  constexpr std::size_t largest = 1 << 20, chunk = 1 << 14;
  const TemporaryFolder folder;
  const std::string path = folder.file("s.pzs");
  const auto size_of = [](std::uint32_t index) { return index % 2 == 0 ? largest : largest / 3; };
  const auto write = [&] {
    return pz::detail::catching_bad_alloc([&]() -> pz::Result<void> {
      pz::detail::FileSink sink{path};
      pz::detail::FileBuilder file{sink, pz::detail::state_file, 1, 14};
      for (std::uint32_t index = 0; index < 8; ++index)
        file.add_made(
            "PART", index,
            [&, index](pz::Vector<std::byte>& out) -> pz::Result<void> {
              out.resize(size_of(index), static_cast<std::byte>(index));
              return {};
            },
            index % 3 == 0 ? pz::Codec::stored : pz::Codec::zstd);
      if (auto finished = file.finish(); !finished) return finished;
      return sink.commit();
    });
  };
  const auto read = [&]() -> pz::Result<void> {
    auto source = pz::detail::ByteSource::open(path);
    if (!source) return source.error();
    std::uint32_t seen = 0;
    auto done = pz::detail::read_each_section(
        *source, pz::detail::state_file, {},
        [&](const pz::SectionInfo& section, std::span<const std::byte> raw) -> pz::Result<void> {
          REQUIRE(section.index == seen);
          REQUIRE(raw.size() == size_of(seen));
          REQUIRE(raw.back() == static_cast<std::byte>(seen++));
          return {};
        });
    if (done) REQUIRE(seen == 8);
    return done;
  };
  const std::int64_t before = allocations.bytes;
  for (const bool writes : {true, false}) {
    allocations.reset_peak();
    REQUIRE((writes ? write() : read()));
    // Also the directories of two sections, the table and what the standard library takes.
    CHECK(allocations.peak - before < static_cast<std::int64_t>(largest + 2 * chunk + chunk / 64 +
                                                                2 * 12 * largest / chunk + 24'576));
    REQUIRE(allocations.bytes == before);
  }
  const auto unchanged = [&] { REQUIRE(allocations.bytes == before); };
  const auto open = [&] {
    return pz::detail::catching_bad_alloc([&]() -> pz::Result<void> { return read(); });
  };
  CHECK(fail_every_allocation(open, unchanged) > 10);
  CHECK(fail_every_allocation(write, unchanged) > 10);
}

TEST_CASE("a model in another order takes memory for one copy, and survives that there is none") {
  constexpr std::size_t items = 20'000, d = 64;
  const auto model = small_model::model({.items = items, .dimension = d, .hidden = 4}, true);
  std::vector<std::string> ids{"new"};
  for (std::size_t i = items; i-- > 0;) ids.push_back("i" + std::to_string(i));
  const std::vector<std::string_view> order(ids.begin(), ids.end());
  const std::int64_t before = allocations.bytes;
  allocations.reset_peak();
  {
    const auto made = pz::detail::in_order(model, order, {});
    REQUIRE(made);
    const std::int64_t held = allocations.bytes - before;
    CHECK(held > static_cast<std::int64_t>(items * (d + 4 + 4 + 32)));
    CHECK(held < static_cast<std::int64_t>(items * (d + 4 + 4 + 32) * 2));
    // Beside it less than a second copy of the vectors.
    CHECK(allocations.peak - before - held < static_cast<std::int64_t>(items * (d + 4)));
  }
  const auto small = small_model::model({.items = 40});
  const std::vector<std::string_view> reversed{"i39", "i38", "new", "i7"}, types{"buy", "click"};
  const std::int64_t then = allocations.bytes;
  CHECK(fail_every_allocation([&] { return pz::detail::in_order(small, reversed, types); },
                              [&] { REQUIRE(allocations.bytes == then); }) > 20);
}

TEST_CASE("writing survives the failure of any allocation, and leaves nothing behind") {
  const TemporaryFolder folder;
  const std::string path = folder.file("w.pzm");
  const auto parts = small_model::parts({.items = 40});
  for (const auto type : {pz::ElementType::i4, pz::ElementType::i8, pz::ElementType::f32})
    for (const int level : {0, 3}) {
#ifdef PERSONALIZE_NO_ZSTD
      if (level != 0) continue;
#endif
      const pz::WriteOptions options{.element_type = type, .zstd_level = level, .chunk_bytes = 512};
      const auto whole = pz::write_model(parts, options);
      REQUIRE(whole);
      const std::int64_t before = allocations.bytes;
      const auto unchanged = [&] { REQUIRE(allocations.bytes == before); };
      CHECK(fail_every_allocation([&] { return pz::write_model(parts, options); }, unchanged) > 50);
      REQUIRE(pz::write_file(path, std::as_bytes(std::span("as it was", 9))));
      CHECK(fail_every_allocation([&] { return pz::save_model(parts, path, options); },
                                  [&] {
                                    unchanged();
                                    REQUIRE(std::filesystem::file_size(path) == 9);
                                    REQUIRE(files_in(folder.path) == 1);
                                  }) > 50);
      CHECK(fail_every_allocation([&] { return pz::read_file(path, 1 << 20); }, unchanged) > 0);
      CHECK(*pz::read_file(path, 1 << 20) == *whole);
      CHECK(fail_every_allocation([&] { return pz::write_file(path, *whole); }, unchanged) > 0);
      CHECK(fail_every_allocation([&] { return pz::list_sections(*whole); }, unchanged) > 0);
    }
}

// Of g++ 12 `shared_ptr<T[]>(new T[n]())` destroys the elements twice where the rest of it throws.
TEST_CASE("a paged array destroys once what it made, whatever allocation fails") {
  static int made, destroyed;
  struct Counted {
    Counted() { ++made; }
    Counted(const Counted&) { ++made; }
    Counted& operator=(const Counted&) = default;
    ~Counted() { ++destroyed; }
  };
  made = destroyed = 0;
  const auto balanced = [] { REQUIRE(made == destroyed); };
  const Counted one;
  --made;
  CHECK(fail_every_allocation(
            [&] {
              return pz::detail::catching_bad_alloc([&]() -> pz::Result<void> {
                pz::PagedArray<Counted> array;
                array.push_back(one);
                pz::PagedArray<Counted> copy = array;
                copy.edit(0) = one;
                return {};
              });
            },
            balanced) > 5);
  balanced();
}

TEST_CASE("a table of strings survives the failure of any allocation") {
  pz::StringTable table;
  for (int i = 0; i < 1000; ++i) {
    const std::string id = "an id that is longer than a short string: " + std::to_string(i);
    fail_every_allocation([&] { return table.add(id); },
                          [&] {
                            REQUIRE(table.size() == static_cast<std::size_t>(i));
                            REQUIRE_FALSE(table.find(id));
                          });
    REQUIRE(table[static_cast<std::size_t>(i)] == id);
    REQUIRE(table.find(id) == i);
  }
}

TEST_CASE("a recommender survives the failure of any allocation, and goes on as if none had been") {
  const auto model = young_model();
  const pz::RecommenderOptions options{.history_length = 30,
                                       .update_interval = std::chrono::seconds{0},
                                       .remembered_slates = 64,
                                       .recommendation_key = {{1, 2}}};
  CHECK(fail_every_allocation([&] { return pz::Recommender::create(model, options); }, [] {}) > 50);

  auto shop = shop_of(model, options), twin = shop_of(model, options);
  std::int64_t now = start;
  const auto compare = [&](std::string_view user) {
    now += 10;
    const pz::Request request{.user = user, .count = 20, .timestamp = now};
    auto a = shop.recommend(request);
    auto b = twin.recommend(request);
    REQUIRE(a);
    REQUIRE(b);
    same_slate(*a, *b);
    CHECK(shop.user_count() == twin.user_count());
  };
  const auto both = [&](auto call) {
    REQUIRE(call(shop));
    REQUIRE(call(twin));
  };

  SUBCASE("while it records new users") {
    // Each failure is followed by a success, so every round takes another user.
    int failures = 0;
    for (int n = 1, got_through = 0; got_through < 3; ++n) {
      const std::string user = "the user with the number " + std::to_string(n);
      const std::vector<std::string_view> shown{"i1", "i2", "i4", "i6"};
      const auto event = [&](pz::Recommender& r) {
        return r.record({.user = user,
                         .item = "i4",
                         .event_type = "click",
                         .timestamp = now,
                         .impressions = shown,
                         .event_id = "the event with an id of some length"});
      };
      allocations.fail_at = n - got_through * 2;
      const auto result = event(shop);
      const bool failed = allocations.fail_at == 0;
      allocations.fail_at = 0;
      if (failed) {
        ++failures;
        REQUIRE_FALSE(result);
        REQUIRE(result.error().code == pz::Errc::out_of_memory);
        REQUIRE(shop.user_count() == twin.user_count());
        const auto again = event(shop);
        REQUIRE(again);
        REQUIRE(*again == pz::Recorded::learned);  // and not a duplicate
      } else {
        REQUIRE(result);
        ++got_through;
      }
      REQUIRE(event(twin));
      compare(user);
    }
    CHECK(failures > 8);
    both([&](pz::Recommender& r) { return r.update(now); });
    compare("the user with the number 1");
  }
  SUBCASE("while it answers, and learns from the slate") {
    for (int n = 1; n < 40; ++n) {
      CAPTURE(n);
      const std::string user = "user " + std::to_string(n % 7);
      both([&](pz::Recommender& r) {
        return r.record({.user = user, .item = "i8", .timestamp = now});
      });
      now += 10;
      const pz::Request request{.user = user, .count = 20, .timestamp = now};
      pz::Slate slate;
      allocations.fail_at = n;
      const auto answered = shop.recommend(request, slate);
      const bool failed = allocations.fail_at == 0;
      allocations.fail_at = 0;
      REQUIRE(answered.has_value() != failed);
      if (failed) REQUIRE(shop.recommend(request, slate));
      const auto other = twin.recommend(request);
      REQUIRE(other);
      same_slate(slate, *other);
      const auto click = [&](pz::Recommender& r, const pz::Slate& of) {
        return r.record(
            {.user = user, .item = of.items[2].item, .timestamp = now, .recommendation_id = of.id});
      };
      allocations.fail_at = n;
      const auto clicked = click(shop, slate);
      const bool missed = allocations.fail_at == 0;
      allocations.fail_at = 0;
      REQUIRE(clicked.has_value() != missed);
      if (missed) REQUIRE(click(shop, slate));
      REQUIRE(click(twin, *other));
      compare(user);
    }
    both([&](pz::Recommender& r) { return r.update(now); });
    compare("user 3");
  }
  SUBCASE("while it answers many users together") {
    std::vector<std::string> users;
    for (int u = 0; u < 40; ++u) users.push_back("user " + std::to_string(u % 39));
    std::vector<pz::Request> requests;
    for (const std::string& user : users) {
      both([&](pz::Recommender& r) {
        return r.record({.user = user, .item = "i8", .timestamp = now});
      });
      requests.push_back({.user = user, .count = 5, .timestamp = now});
    }
    std::vector<pz::Slate> slates(requests.size());
    int failures = 0;
    for (int n = 1; n < 2000; n += 1 + n / 8) {
      CAPTURE(n);
      for (pz::Slate& slate : slates) slate.items.assign(1, {"of an earlier call", 0, {}, 1});
      allocations.fail_at = n;
      const auto answered = shop.recommend(requests, slates);
      const bool failed = allocations.fail_at == 0;
      allocations.fail_at = 0;
      REQUIRE(answered.has_value() != failed);
      failures += failed;
      for (std::size_t r = 0; r < requests.size(); ++r) {
        const pz::Slate& slate = slates[r];
        REQUIRE((slate.items.size() == 5 || (failed && slate.items.empty())));
        // One that was not reached counts as not asked for.
        if (!slate.items.empty()) same_slate(slate, *twin.recommend(requests[r]));
      }
    }
    CHECK(failures > 10);
    for (int u = 0; u < 40; ++u) compare(users[static_cast<std::size_t>(u)]);
  }
  SUBCASE("while it grows by items and updates") {
    both([&](pz::Recommender& r) {
      return r.record({
          .user = "u",
          .item = "i8",
          .timestamp = now,
      });
    });
    const pz::NewItem item{.item = "an item that nobody has seen before",
                           .creation_timestamp = now,
                           .fields = {{"GENRE", "bow|sword"}, {"PRICE", "2"}}};
    const auto unchanged = [&] { REQUIRE(shop.model()->item_count() == 60); };
    CHECK(fail_every_allocation([&] { return shop.put_item(item); }, unchanged) > 1);
    REQUIRE(twin.put_item(item));
    CHECK(fail_every_allocation([&] { return shop.update(now); }, unchanged) > 50);
    REQUIRE(twin.update(now));
    CHECK(shop.model()->item_count() == 61);
    compare("u");
  }
  SUBCASE("while another model comes") {
    for (const char* user : {"u", "v"})
      for (const char* item : {"i8", "i31", "i5"})
        both([&](pz::Recommender& r) {
          return r.record({.user = user, .item = item, .timestamp = now});
        });
    const pz::NewItem item{.item = "an item that no model has",
                           .creation_timestamp = now,
                           .fields = {{"GENRE", "bow|sword"}, {"PRICE", "2"}}};
    both([&](pz::Recommender& r) { return r.put_item(item); });
    both([&](pz::Recommender& r) { return r.update(now); });
    const auto answer = [&](pz::Recommender& r) {
      const auto slate = r.recommend({.user = "u", .count = 9, .timestamp = now});
      REQUIRE(slate);
      const std::vector<std::string_view> shown{"i1", "i2", "i4"};
      REQUIRE(r.record({.user = "u",
                        .item = slate->items[0].item,
                        .timestamp = now,
                        .recommendation_id = slate->id}));
      return r.record({.user = "v", .item = "i4", .timestamp = now, .impressions = shown});
    };
    const auto next = small_model::model({.items = 70, .dimension = 27, .hidden = 9, .seed = 4});
    const auto nothing_came = [&] {
      REQUIRE(shop.model()->dimension() == model->dimension());
      REQUIRE(shop.item_count() == 61);
    };
    both(answer);
    CHECK(fail_every_allocation([&] { return shop.swap(next); }, nothing_came) > 100);
    REQUIRE(twin.swap(next));
    CHECK(shop.model()->dimension() == 27);
    compare("u");
    compare("v");
    both(answer);
    // What failed has left no counts behind that nobody learns of.
    both([&](pz::Recommender& r) { return r.update(now); });
    for (int i = 0; i < 60; ++i) {
      const std::string id = "i" + std::to_string(i);
      const auto a = shop.explain({.user = "w", .timestamp = now}, id),
                 b = twin.explain({.user = "w", .timestamp = now}, id);
      REQUIRE(a);
      REQUIRE(b);
      CHECK(a->score == b->score);
      CHECK(a->quality == b->quality);
    }
    // Users are given the new model's states where memory runs out, or later.
    REQUIRE(shop.swap(model));
    REQUIRE(twin.swap(model));
    for (int n = 1; n < 20; ++n) {
      allocations.fail_at = n;
      (void)shop.update(now);
      allocations.fail_at = 0;
    }
    compare("u");
    compare("v");
  }
  SUBCASE("while a session becomes a user's") {
    for (int n = 1; n < 30; ++n) {
      const std::string session = "session " + std::to_string(n), user = "u" + std::to_string(n);
      both([&](pz::Recommender& r) {
        return r.record({.session = session, .item = "i8", .timestamp = now});
      });
      allocations.fail_at = n;
      const auto merged = shop.merge_session(session, user);
      const bool failed = allocations.fail_at == 0;
      allocations.fail_at = 0;
      REQUIRE(merged.has_value() != failed);
      if (failed) {
        const auto again = shop.merge_session(session, user);
        REQUIRE(again);
        REQUIRE(*again);
      }
      REQUIRE(twin.merge_session(session, user));
      compare(user);
    }
  }
}
