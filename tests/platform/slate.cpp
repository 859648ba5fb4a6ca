// The same model and calls wherever it is compiled: tests/platforms compares what it prints.
// usage: slate write MODEL             makes the model, stored, in 8 bits
//        slate run MODEL FOLDER [SET]  serves it with that instruction set ("scalar"), and writes
//                                      models into FOLDER
//        slate time MODEL              prints the microseconds of a slate and an event
#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

#include "../small_model.hpp"

namespace {

namespace pz = personalize;

template <class Value>
auto must(pz::Result<Value> result, const char* what) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "%s: %s\n", what, result.error().message.c_str());
  std::exit(1);
}
void must(const pz::Result<void>& result, const char* what) {
  if (result) return;
  std::fprintf(stderr, "%s: %s\n", what, result.error().message.c_str());
  std::exit(1);
}
void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "it is false that %s\n", what);
  std::exit(1);
}

constexpr std::int64_t begin = 1'700'000'000;

pz::RecommenderOptions options(const std::string& instruction_set) {
  pz::RecommenderOptions chosen;
  chosen.updates = pz::Updates::by_caller;
  chosen.clock = [] { return begin + 1'000'000; };
  chosen.exploration_item_age_cut_off = std::chrono::days{3650};
  chosen.recommendation_key = {1, 2};
  chosen.seed = 7;
  chosen.instruction_set = instruction_set;
  return chosen;
}

void print(const std::string& title, const pz::Slate& slate) {
  std::printf("%s\n", title.c_str());
  for (const pz::Pick& pick : slate.items)
    std::printf("  %.*s %.*s %.9g %.9g\n", static_cast<int>(pick.item.size()), pick.item.data(),
                static_cast<int>(pz::name(pick.reason).size()), pz::name(pick.reason).data(),
                static_cast<double>(pick.score), static_cast<double>(pick.propensity));
}

// Events, slates that are seen and answered, an item that comes, updates.
void serve(pz::Recommender& recommender, bool prints) {
  small_model::Random random{3};
  const auto asked = [](const std::string& user, std::int64_t at) {
    return pz::Request{.user = user, .count = 10, .timestamp = at};
  };
  std::int64_t now = begin;
  for (int round = 0; round < 3; ++round) {
    for (int u = 0; u < 12; ++u) {
      const std::string user = "u" + std::to_string(u);
      for (int e = 0; e < 6; ++e, now += 61) {
        const std::string item = "i" + std::to_string(random.below(300));
        must(recommender.record({.user = user,
                                 .item = item,
                                 .event_type = e % 2 != 0 ? "click" : "view",
                                 .timestamp = now}),
             "an event");
      }
      const pz::Slate slate = must(recommender.recommend(asked(user, now)), "a slate");
      if (prints) print("round " + std::to_string(round) + ", " + user, slate);
      must(recommender.record_impression(
               {.user = user, .recommendation_id = slate.id, .timestamp = now}),
           "an impression");
      if (u % 3 != 0) continue;
      must(recommender.record({.user = user,
                               .item = slate.items[random.below(10)].item,
                               .event_type = "click",
                               .timestamp = now + 5,
                               .recommendation_id = slate.id}),
           "a choice");
    }
    const std::string added = "new" + std::to_string(round);
    must(recommender.put_item({.item = added,
                               .creation_timestamp = now - 100,
                               .fields = {{"GENRE", "bow|shield"}, {"PRICE", "1.5e0"}}}),
         "an item");
    must(recommender.update(now), "an update");
  }
  const pz::Slate popular = must(recommender.recommend(asked("stranger", now)), "a slate");
  if (prints) print("stranger", popular);
}

// Files: written, replaced, read again, by a name that is not ASCII.
void check_files(const pz::Model& model, const std::string& folder) {
  const std::string path = folder +
                           "/gr\xc3\xb6\xc3\x9f"
                           "e \xe6\xa8\xa1\xe5\x9e\x8b.pzm";
  const pz::WriteOptions stored{.zstd_level = 0};
  must(pz::write_file(path, {}), "an empty file");
  must(pz::save_model(model.parts(), path, stored), "a model over a file");
  must(pz::save_model(model.parts(), path, stored), "a model over a model");
  const auto again = must(pz::Model::load(path, {.threads = 2}), "the model that was written");
  must(again->item_count() == model.item_count() &&
           again->parts().item_vectors == model.parts().item_vectors,
       "the model that was written is the one that is read");
  must(pz::read_model(folder + "/none.pzm").error().code == pz::Errc::io,
       "a file that is not there is told");
  must(!pz::save_model(model.parts(), folder + "/none/model.pzm", stored),
       "a folder that is not there is told");
}

// A model file of one section that claims to hold so much.
pz::Vector<std::byte> claiming(pz::ElementType type, std::uint64_t rows, std::uint64_t columns,
                               std::uint64_t raw_size) {
  namespace detail = pz::detail;
  pz::Vector<std::byte> table, file;
  for (const char c : std::string_view("IVEC")) table.push_back(static_cast<std::byte>(c));
  detail::append_integer(table, std::uint32_t{0});
  for (const unsigned byte : {1u, static_cast<unsigned>(type), 2u, 24u, 0u, 0u, 0u, 0u})
    table.push_back(static_cast<std::byte>(byte));
  const std::uint64_t chunks = (raw_size + (1u << 24) - 1) >> 24, stored = chunks * (12 + 1024);
  for (const std::uint64_t word : {rows, columns, std::uint64_t{1}, std::uint64_t{64 + 72}, stored,
                                   raw_size, std::uint64_t{0}})
    detail::append_integer(table, word);
  for (const unsigned char c : detail::model_file.magic) file.push_back(static_cast<std::byte>(c));
  detail::append_integer(file, std::uint16_t{2});
  detail::append_integer(file, std::uint16_t{0});
  detail::append_integer(file, std::uint32_t{1});
  detail::append_integer(file, 64 + 72 + stored);
  detail::append_integer(file, pz::xxh64(table));
  file.resize(56);
  detail::append_integer(file, pz::xxh64(file));
  file.insert(file.end(), table.begin(), table.end());
  file.resize(file.size() + static_cast<std::size_t>(stored));
  return file;
}

// What does not fit std::size_t is refused, and not cut off.
void check_sizes(const std::shared_ptr<const pz::Model>& model) {
  constexpr std::uint64_t gib = std::uint64_t{1} << 30;
  pz::LoadOptions generous;
  generous.limits.raw_bytes = std::numeric_limits<std::uint64_t>::max();
  generous.limits.expansion = std::numeric_limits<std::uint32_t>::max();
  generous.limits.items = std::numeric_limits<std::uint64_t>::max();
  generous.limits.dimension = std::numeric_limits<std::uint32_t>::max();
  const auto code = [&](const pz::Vector<std::byte>& file) {
    const auto read = pz::read_model(file, generous);
    return read ? pz::Errc::cancelled : read.error().code;
  };
  // Cut off to 32 bits these are models of 16 bytes, of no rows, and of 64 bytes in i8.
  const auto i8 = pz::ElementType::i8, f32 = pz::ElementType::f32, i4 = pz::ElementType::i4;
  const bool narrow = sizeof(std::size_t) < 8;
  must(code(claiming(f32, gib, 1, 4 * gib)) == (narrow ? pz::Errc::limit : pz::Errc::corrupt),
       "4 GiB are refused");
  must(code(claiming(f32, 4 * gib, 0, 0)) == (narrow ? pz::Errc::limit : pz::Errc::corrupt),
       "2^32 rows are refused");
  must(code(claiming(i8, 4, gib - 3, 4 * (gib + 1))) ==
           (narrow ? pz::Errc::limit : pz::Errc::corrupt),
       "just over 4 GiB are refused");
  must(code(claiming(i4, gib / 4, 16, gib / 4 * 13)) ==
           (narrow ? pz::Errc::limit : pz::Errc::corrupt),
       "what becomes 5 GiB in i8 is refused");
  pz::RecommenderOptions large;
  large.user_bytes = large.context_bytes = large.pending_bytes = std::uint64_t{1} << 50;
  large.max_users = std::uint64_t{1} << 40;
  pz::Recommender recommender = must(pz::Recommender::create(model, large), "budgets of 2^50");
  for (int u = 0; u < 200; ++u) {
    const std::string user = "u" + std::to_string(u);
    must(recommender.record({.user = user, .item = "i1"}), "an event");
  }
  must(recommender.user_count() == 200, "budgets of 2^50 have room for 200 users");
  if (!narrow) return;
  large.slate_log_bytes = std::uint64_t{1} << 40;
  const auto refused = pz::Recommender::create(model, large);
  must(!refused && refused.error().code == pz::Errc::invalid_argument,
       "a slate log of 2^40 bytes is refused");
#if PERSONALIZE_HAS_EXCEPTIONS
  for (const auto type : {f32, i8})
    must(!pz::detail::catching_bad_alloc([&]() -> pz::Result<pz::Matrix> {
      return pz::Matrix::zeros(std::size_t{1} << 16, (std::size_t{1} << 16) + 1, type);
    }),
         "a matrix of 2^32 values cannot be had");
#endif
}

// With the options that a user starts from.
void check_defaults(const std::shared_ptr<const pz::Model>& model) {
  pz::Recommender recommender = must(pz::Recommender::create(model), "default options");
  must(recommender.record({.user = "u", .item = "i1", .event_type = "view"}), "an event");
  must(recommender.put_item({.item = "fresh"}), "an item");
  must(recommender.update(), "an update");
  must(recommender.find_item("fresh").has_value(), "an item that was put is found");
  must(must(recommender.recommend({.user = "u"}), "a slate").items.size() == 25,
       "a slate has 25 picks");
}

void time_slates(const std::shared_ptr<const pz::Model>& model) {
  using Clock = std::chrono::steady_clock;
  pz::Recommender recommender = must(pz::Recommender::create(model, options({})), "options");
  constexpr int rounds = 2000;
  for (int warm = 0; warm < 2; ++warm) {
    const auto from = Clock::now();
    for (int i = 0; i < rounds; ++i) {
      const std::string item = "i" + std::to_string(i % 300);
      must(recommender.record({.user = "u", .item = item, .timestamp = begin + i}), "an event");
      must(recommender.recommend({.user = "u", .timestamp = begin + i}), "a slate");
    }
    const std::chrono::duration<double, std::micro> took = Clock::now() - from;
    if (warm == 1)
      std::printf("%s %.1f\n", std::string(recommender.instruction_set()).c_str(),
                  took.count() / rounds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view command = argc < 3 ? "" : argv[1];
  if (command == "write") {
    const auto parts = small_model::parts({.items = 500, .dimension = 128, .hidden = 128});
    must(pz::save_model(parts, argv[2], {.zstd_level = 0}), "the model");
    return 0;
  }
  if (command != "run" && command != "time") {
    std::fprintf(stderr, "usage: slate write|run|time MODEL [FOLDER [SET]]\n");
    return 2;
  }
  const auto model = must(pz::Model::load(argv[2]), "the model");
  if (command == "time") {
    time_slates(model);
    return 0;
  }
  const std::string instruction_set = argc > 4 ? argv[4] : "";
  pz::Recommender recommender =
      must(pz::Recommender::create(model, options(instruction_set)), "options");
  std::printf("instruction set: %s\n", std::string(recommender.instruction_set()).c_str());
  serve(recommender, true);
  check_files(*recommender.model(), argv[3]);
  check_sizes(model);
  check_defaults(model);
  return 0;
}
