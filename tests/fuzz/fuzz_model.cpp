// A model file from anywhere: it is refused at once and without much memory, or it serves, keeps
// every promise, and can be written and read again. The mutator knows the file's structure, so that
// what lies behind checksums, compression and shapes is reached as well.
#include <sanitizer/allocator_interface.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../small_model.hpp"
#include "container.hpp"
#include "promises.hpp"

namespace pz = personalize;
using container::Bytes;
using container::Section;
using promises::require;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

// ---- what refusing a file may cost

// Of CPU: 10 ms in a program built with -O2; sanitizers take some 20 times as long.
constexpr double refusal_seconds = 0.010 * 20;
constexpr std::int64_t refusal_bytes = std::int64_t{16} << 20;

std::atomic<std::int64_t> memory{0}, peak{0};

void note_allocation(const volatile void*, std::size_t size) {
  const std::int64_t now = memory += static_cast<std::int64_t>(size);
  std::int64_t before = peak;
  while (before < now && !peak.compare_exchange_weak(before, now)) {
  }
}

void note_release(const volatile void* pointer) {
  if (pointer) memory -= static_cast<std::int64_t>(__sanitizer_get_allocated_size(pointer));
}

double cpu_seconds() {
  std::timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

pz::Result<std::shared_ptr<const pz::Model>> load(std::span<const std::byte> file,
                                                  const pz::LoadOptions& options) {
  const std::int64_t before = memory;
  peak = before;
  const double begin = cpu_seconds();
  auto model = pz::Model::from_bytes(file, options);
  const double seconds = cpu_seconds() - begin;
  if (!model) {
    require(peak - before < refusal_bytes, "a file is refused within 16 MiB");
    require(seconds < refusal_seconds, "a file is refused within 10 ms");
    require(!model.error().message.empty(), "an error says why");
  }
  return model;
}

// ---- what a model that was accepted can do

constexpr std::int64_t start = 1'700'000'000, day = 86'400, clock_time = start + 10 * day;

// Statistics with times that lie ahead of the clock are refused.
bool is_ahead(const pz::Model& model) {
  for (const pz::ItemStatistics& s : model.parts().statistics)
    for (const std::int64_t t : {s.first_timestamp, s.last_timestamp, s.creation_timestamp})
      if (t > clock_time + day) return true;
  return false;
}

void check_rewriting(const pz::Model& model, const pz::LoadOptions& options) {
  for (const auto type : {pz::ElementType::f32, pz::ElementType::i8, pz::ElementType::i4}) {
    const auto bytes =
        pz::write_model(model.parts(), {.element_type = type, .zstd_level = 1, .chunk_bytes = 64});
    require(bytes.has_value(), "a model that was accepted can be written");
    const auto again = pz::Model::from_bytes(*bytes, options);
    require(again.has_value(), "a model that was written can be read again");
    require((*again)->item_count() == model.item_count(), "no item is lost");
    require((*again)->fingerprints() == model.fingerprints(), "the fingerprints stay");
  }
}

class Round {
 public:
  Round(pz::Recommender& shop, std::int64_t timestamp)
      : shop_(shop), model_(shop.model()), now_(timestamp) {}

  void run() {
    record_items("u", {});
    record_items({}, "s");
    ask();
    ask_many();
    rank_and_explain();
    change_items();
  }

 private:
  std::string_view item(std::size_t i) const {
    return model_->item_id(static_cast<std::uint32_t>(i % model_->item_count()));
  }

  void record_items(std::string_view user, std::string_view session) {
    const auto& types = model_->parts().event_types;
    for (std::size_t i = 0; i < 6; ++i) {
      const auto recorded = shop_.record(
          {.user = user,
           .session = session,
           .item = i == 5 ? "no such item" : item(7 * i),
           .event_type = types.empty() ? std::string_view{}
                                       : types[static_cast<std::uint32_t>(i % types.size())],
           .timestamp = now_ + static_cast<std::int64_t>(60 * i)});
      require(recorded.has_value(), "a right event is recorded");
      require((*recorded == pz::Recorded::unknown_item) ==
                  !model_->find_item(i == 5 ? "no such item" : item(7 * i)),
              "an event of an unknown item says so");
    }
  }

  // Slates of everyone, what was seen of them and what was chosen.
  void ask() {
    for (const std::string_view user : {"u", "new"}) {
      const auto slate = shop_.recommend({.user = user, .count = 5, .timestamp = now_ + 400});
      require(slate.has_value(), "a right request is answered");
      promises::check_slate(*slate, 5, shop_);
      if (slate->items.empty() || slate->id.empty()) continue;
      require(shop_
                  .record_impression(
                      {.user = user, .recommendation_id = slate->id, .timestamp = now_ + 410})
                  .has_value(),
              "a right impression is recorded");
      const auto recorded = shop_.record({.user = user,
                                          .item = slate->items.back().item,
                                          .timestamp = now_ + 420,
                                          .recommendation_id = slate->id});
      require(recorded && *recorded == pz::Recorded::learned, "an answer to a slate is learnt");
    }
    pz::ItemMask every_second(model_->item_count());
    for (std::uint32_t i = 0; i < model_->item_count(); i += 2) every_second.set(i);
    const auto masked = shop_.recommend({.user = "u",
                                         .session = "s",
                                         .count = 7,
                                         .exclude_interacted = true,
                                         .eligible = &every_second,
                                         .timestamp = now_ + 430});
    require(masked.has_value(), "a right request is answered");
    promises::check_slate(*masked, 7, shop_);
    for (const pz::Pick& pick : masked->items)
      require(every_second.test(*model_->find_item(pick.item)), "picks are eligible");
  }

  void ask_many() {
    const std::array<pz::Request, 3> requests{
        pz::Request{.user = "u", .count = 4, .timestamp = now_ + 500},
        pz::Request{.session = "s", .count = 10000, .timestamp = now_ + 500},
        pz::Request{.user = "nobody", .count = 1, .timestamp = now_ + 500}};
    std::array<pz::Slate, 3> slates;
    require(shop_.recommend(requests, slates).has_value(), "right requests are answered");
    for (std::size_t i = 0; i < slates.size(); ++i)
      promises::check_slate(slates[i], requests[i].count, shop_);
  }

  void rank_and_explain() {
    std::vector<std::string_view> items{"no such item"};
    for (std::size_t i = 0; i < 5; ++i) items.push_back(item(3 * i));
    for (const std::string_view user : {"u", "new"}) {
      pz::Slate order;
      const pz::Request request{.user = user, .timestamp = now_ + 600};
      require(shop_.rank(request, items, order).has_value(), "right items are ranked");
      promises::check_order(order, items);
      const auto parts = shop_.explain(request, item(1));
      require(parts.has_value(), "an item of the catalogue is explained");
      promises::check_explanation(*parts);
    }
  }

  void change_items() {
    const auto& fields = model_->parts().fields;
    pz::NewItem new_item{.item = "new item", .creation_timestamp = now_};
    for (const auto& field : fields)
      new_item.fields.emplace_back(
          field.name, field.numeric || field.vocabulary.empty() ? "1.5" : field.vocabulary[0]);
    const auto put = shop_.put_item(new_item);
    require(put || put.error().message.find("not finite") != std::string::npos,
            "a right item is put, unless its embeddings add up to too much");
    const std::size_t items = shop_.item_count();
    const std::string removed(item(2));
    require(*shop_.remove_item(removed), "an item is removed");
    update();
    require(!shop_.explain({.user = "u", .timestamp = now_ + 800}, removed),
            "an item that was removed is not there");
    require(shop_.put_item({.item = removed}).has_value(), "an item is put back");
    update();
    require(shop_.explain({.user = "u", .timestamp = now_ + 800}, removed).has_value(),
            "an item that was put back is there");
    require(shop_.item_count() >= items, "an update loses no item");
    require(shop_.merge_session("s", "u").has_value(), "a session can be merged");
    require(shop_.user_count() >= 1, "users are counted");
    require(shop_.forget("new") != shop_.forget("new"), "a user is forgotten once");
  }

  void update() {
    require(shop_.update(now_ + 700).has_value(), "an update succeeds");
    require(!shop_.update_report().error, "an update reports no error");
    require(shop_.model() != nullptr, "what an update made is a model");
  }

  pz::Recommender& shop_;
  std::shared_ptr<const pz::Model> model_;
  std::int64_t now_;
};

// ---- the mutator

class Mutator {
 public:
  Mutator(std::vector<Section> sections, unsigned seed)
      : sections_(std::move(sections)), random_(seed) {}

  Bytes run() {
    if (random_.below(8) != 0)
      for (std::uint32_t n = 1 + random_.below(3); n > 0; --n) mutate(any());
    Bytes file = container::put_together(sections_);
    if (random_.below(4) == 0) lie(file);
    return file;
  }

 private:
  Section& any() { return sections_[random_.below(static_cast<std::uint32_t>(sections_.size()))]; }

  std::uint64_t extreme() {
    constexpr std::array<std::uint64_t, 18> values{
        0,          1,          2,          3,          16,         255,
        256,        65535,      65536,      0xffffffff, 1ull << 32, 1ull << 35,
        1ull << 40, 1ull << 62, 1ull << 63, ~0ull,      ~0ull - 1,  4102444800u};
    return values[random_.below(values.size())];
  }

  float extreme_float() {
    constexpr std::array<float, 14> values{0.0f,   -0.0f, 1.0f,  -1.0f, 1e-45f, 1e-38f, 1e-20f,
                                           1e-10f, 1e10f, 1e18f, 1e20f, 3e38f,  -3e38f, 0.5f};
    if (random_.below(16) == 0) return std::numeric_limits<float>::quiet_NaN();
    if (random_.below(16) == 0) return std::numeric_limits<float>::infinity();
    return values[random_.below(values.size())];
  }

  // Somewhere in the section, in steps of `size`.
  std::size_t place(const Section& section, std::size_t size) {
    return size * random_.below(static_cast<std::uint32_t>(
                      std::max<std::size_t>(section.raw.size() / size, 1)));
  }

  void mutate(Section& section) {
    switch (random_.below(16)) {
      case 0:
      case 1:
        return mutate_bytes(section);
      case 2:
      case 3:
      case 4:
        return mutate_values(section);
      case 5:
        return scale(section);
      case 6:
        return resize_rows(section);
      case 7:
        section.shape[random_.below(3)] = extreme();
        return;
      case 8:
        section.codec ^= 1;
        return;
      case 9:
        section.chunk_log2 = static_cast<std::uint8_t>(6 + random_.below(25));
        return;
      case 10:
        section.element_type = static_cast<std::uint8_t>(random_.below(8));
        return;
      case 11:
        section.index =
            static_cast<std::uint32_t>(random_.below(4) == 0 ? extreme() : random_.below(6));
        return;
      case 12:
        return mutate_table();
      case 13:
        return mutate_program();
      case 14:
        std::swap(section.raw, any().raw);
        return;
      default:
        return mutate_strings(section);
    }
  }

  void mutate_bytes(Section& section) {
    const std::size_t size = section.raw.size(), most = size + 16;
    section.raw.resize(most);
    section.raw.resize(
        LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(section.raw.data()), size, most));
  }

  // One value, or a row of them, of the type that the section says it has.
  void mutate_values(Section& section) {
    for (std::uint32_t n = 1 + random_.below(4); n > 0; --n) {
      if (section.is("STAT") || section.element_type == 3) {
        const std::uint64_t value =
            random_.below(2) == 0 ? extreme()
                                  : static_cast<std::uint64_t>(start) + random_.below(1u << 31);
        container::put(section.raw, place(section, 8), value);
      } else if (section.element_type == 4) {
        container::put(section.raw, place(section, 4),
                       random_.below(3) == 0 ? extreme() : random_.below(12), 4);
      } else {
        const float value = extreme_float();
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, 4);
        container::put(section.raw, place(section, 4), bits, 4);
      }
    }
  }

  // All floats by a power of ten: norms that overflow, or vanish, only when they are multiplied.
  void scale(Section& section) {
    if (section.element_type != 2 && section.element_type != 1) return;
    const float factor = extreme_float();
    const std::size_t floats = section.element_type == 2                    ? section.raw.size() / 4
                               : section.shape[0] <= section.raw.size() / 4 ? section.shape[0]
                                                                            : 0;
    for (std::size_t i = 0; i < floats; ++i) {
      float value = 0;
      std::memcpy(&value, section.raw.data() + 4 * i, 4);
      value *= factor;
      std::memcpy(section.raw.data() + 4 * i, &value, 4);
    }
  }

  // Shape and bytes together, so that the section is right in itself.
  void resize_rows(Section& section) {
    const std::size_t dimension =
        random_.below(section.rank == 0 ? 1 : std::min<std::uint32_t>(section.rank, 3));
    std::uint64_t& length = section.shape[dimension];
    if (length == 0 || length > 65536 || section.raw.size() % length != 0) return;
    const std::uint64_t wanted = random_.below(2) == 0 ? length - 1 : length + 1 + random_.below(3);
    section.raw.resize(section.raw.size() / length * wanted);
    length = wanted;
  }

  void mutate_table() {
    const std::uint32_t at = random_.below(static_cast<std::uint32_t>(sections_.size()));
    switch (random_.below(6)) {
      case 0:
        if (sections_.size() > 1) sections_.erase(sections_.begin() + at);
        return;
      case 1: {
        const Section copy = sections_[at];
        sections_.push_back(copy);
        sections_.back().index += random_.below(2);
        return;
      }
      case 2:
        std::swap(sections_[at], any());
        return;
      case 3: {
        Section unknown = sections_[at];
        unknown.tag = {'X', 'Y', 'Z', 'A'};
        sections_.insert(sections_.begin() + at, unknown);
        return;
      }
      case 4:
        sections_[at].rank = static_cast<std::uint8_t>(random_.below(5));
        return;
      default:
        sections_[at].tag = any().tag;
        return;
    }
  }

  void mutate_program() {
    for (Section& section : sections_) {
      if (!section.is("ENCO")) continue;
      const std::size_t operations = section.raw.size() / 8;
      const std::size_t at = 8 * random_.below(static_cast<std::uint32_t>(operations + 1));
      const auto where = section.raw.begin() + static_cast<std::ptrdiff_t>(at);
      if (random_.below(3) == 0 && at + 8 <= section.raw.size()) {
        section.raw.erase(where, where + 8);
      } else {
        section.raw.insert(where, 8, std::byte{0});
        container::put(section.raw, at, random_.below(11), 4);
        container::put(section.raw, at + 4, random_.below(5), 4);
      }
      section.shape[0] = section.raw.size() / 8;
      return;
    }
  }

  // Lengths and bytes of ids: empty, too long, repeated, no UTF-8.
  void mutate_strings(Section& section) {
    const std::uint64_t count = section.shape[0];
    if (section.element_type != 5 || count == 0 || count > section.raw.size() / 2) return;
    const std::size_t length = 2 * random_.below(static_cast<std::uint32_t>(count));
    switch (random_.below(3)) {
      case 0:
        container::put(section.raw, length, random_.below(2) == 0 ? extreme() : random_.below(4),
                       2);
        return;
      case 1: {
        const std::size_t text = section.raw.size() - 2 * count;
        if (text == 0) return;
        const std::array<unsigned char, 6> bytes{0, '"', '\n', 0xff, 0xc0, 'i'};
        section.raw[2 * count + random_.below(static_cast<std::uint32_t>(text))] =
            std::byte{bytes[random_.below(bytes.size())]};
        return;
      }
      default:
        section.raw.insert(section.raw.end(), 300, std::byte{'x'});
        container::put(section.raw, 2 * count - 2, get_length(section, count) + 300, 2);
        return;
    }
  }

  static std::uint64_t get_length(const Section& section, std::uint64_t count) {
    return container::get(section.raw, 2 * count - 2, 2);
  }

  // What the header, the table or a chunk directory says, against what is there.
  void lie(Bytes& file) {
    const std::size_t entry = 64 + 72 * random_.below(static_cast<std::uint32_t>(sections_.size()));
    const std::size_t offset = container::get(file, entry + 40, 8);
    switch (random_.below(6)) {
      case 0:
        container::put(file, entry + 40 + 8 * random_.below(3), extreme());
        return;
      case 1:
        container::put(file, entry + 56,
                       container::get(file, entry + 56, 8) + 1 - random_.below(3));
        return;
      case 2:
        container::put(file, offset + 12 * random_.below(4), extreme(), 4);
        return;
      case 3:
        container::put(file, 8 + 2 * random_.below(3), extreme(), 2);
        return;
      case 4:
        // Into a chunk: a zstd frame that is none, or that declares another size.
        container::put(file, offset + 12 + random_.below(24), random_.below(256), 1);
        return;
      default:
        file.resize(file.size() - std::min<std::size_t>(file.size(), 1 + random_.below(40)));
        return;
    }
  }

  std::vector<Section> sections_;
  small_model::Random random_;
};

std::size_t give(const Bytes& file, std::uint8_t* data, std::size_t max_size) {
  if (file.empty() || file.size() > max_size) return 0;
  std::memcpy(data, file.data(), file.size());
  return file.size();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  __sanitizer_install_malloc_and_free_hooks(note_allocation, note_release);
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  auto sections = container::take_apart(std::as_bytes(std::span(data, size)));
  if (sections.empty()) return LLVMFuzzerMutate(data, size, max_size);
  const std::size_t given = give(Mutator(std::move(sections), seed).run(), data, max_size);
  return given != 0 ? given : LLVMFuzzerMutate(data, size, max_size);
}

// Sections of one file in the place of the same ones of another.
extern "C" std::size_t LLVMFuzzerCustomCrossOver(const std::uint8_t* data, std::size_t size,
                                                 const std::uint8_t* other, std::size_t other_size,
                                                 std::uint8_t* out, std::size_t max_size,
                                                 unsigned seed) {
  auto sections = container::take_apart(std::as_bytes(std::span(data, size)));
  const auto others = container::take_apart(std::as_bytes(std::span(other, other_size)));
  small_model::Random random(seed);
  for (Section& section : sections)
    for (const Section& its : others)
      if (its.tag == section.tag && its.index == section.index && random.below(4) == 0)
        section = its;
  return give(container::put_together(sections), out, max_size);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  Bytes file(input.begin(), input.end());
  container::seal(file);
  const pz::LoadOptions options{.limits = {.file_bytes = 1 << 20,
                                           .raw_bytes = std::uint64_t{64} << 20,
                                           .items = 4096,
                                           .dimension = 64}};
  const auto model = load(file, options);
  if (!model) return 0;
  check_rewriting(**model, options);
  auto shop = pz::Recommender::create(*model, {.history_length = 4,
                                               .max_users = 64,
                                               .exploration_weight = 0.5f,
                                               .updates = pz::Updates::by_caller,
                                               .remembered_slates = 8,
                                               .slate_log_bytes = std::uint64_t{1} << 20,
                                               .clock = [] { return clock_time; },
                                               .recommendation_key = {{1, 2}}});
  require(shop.has_value() != is_ahead(**model), "a model that was accepted can be served");
  if (!shop) return 0;
  for (std::int64_t round = 0; round < 3; ++round) Round(*shop, start + day * round).run();
  check_rewriting(*shop->model(), options);
  return 0;
}
