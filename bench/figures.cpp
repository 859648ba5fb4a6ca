// The figures of the README: one JSON line each, with a peer measured in the same run where there
// is one. Rounds of ours and the peer's alternate; value and peer_value are medians of all calls,
// ratio the median of the rounds' ratios. usage: figures [NAME...]
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#include <zstd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "measure.hpp"
#include "personalize_runtime.hpp"
#if defined(PERSONALIZE_BENCH_FAISS)
#include <faiss/IndexFlat.h>
#endif

namespace pz = personalize;

namespace {

using Work = std::function<void()>;

double microseconds(const Work& work) {
  const auto begin = Clock::now();
  work();
  return since(begin);
}

struct Figure {
  std::string name, data, unit = "us", peer = {};
  // Calls of one round; a call's time is divided by `per_call`.
  int calls = 50;
  double per_call = 1;
};

void line(const Figure& f, double value, double p99, double peer_value, double ratio) {
  std::printf(R"({"name": "%s", "data": "%s", "value": %.4g, "p99": %.4g, "unit": "%s")",
              f.name.c_str(), f.data.c_str(), value, p99, f.unit.c_str());
  if (!f.peer.empty())
    std::printf(R"(, "peer": "%s", "peer_value": %.4g, "ratio": %.3g)", f.peer.c_str(), peer_value,
                ratio);
  std::printf("}\n");
  std::fflush(stdout);
}

void measure(const Figure& f, const Work& ours, const Work& peer = {}) {
  std::vector<double> all, peer_all, ratios;
  for (int round = 0; round < 9; ++round) {
    std::vector<double> a, b;
    for (int call = 0; call < f.calls; ++call) a.push_back(microseconds(ours) / f.per_call);
    if (peer)
      for (int call = 0; call < f.calls; ++call) b.push_back(microseconds(peer) / f.per_call);
    if (round == 0) continue;  // warms caches and pages
    all.insert(all.end(), a.begin(), a.end());
    if (!peer) continue;
    peer_all.insert(peer_all.end(), b.begin(), b.end());
    ratios.push_back(quantile(a, 0.5) / quantile(b, 0.5));
  }
  line(f, quantile(all, 0.5), quantile(all, 0.99), peer ? quantile(peer_all, 0.5) : 0,
       peer ? quantile(ratios, 0.5) : 0);
}

std::shared_ptr<const pz::Model> model_of(std::size_t items, std::size_t d, pz::ElementType type,
                                          float spread = 0) {
  auto model = pz::Model::from_parts(parts_of(items, d, type, spread));
  if (!model) std::abort();
  return *model;
}

std::vector<std::vector<float>> random_queries(std::size_t d) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> queries(100, std::vector<float>(pz::kernels::padded(d)));
  for (auto& query : queries)
    for (std::size_t c = 0; c < d; ++c) query[c] = normal(random);
  return queries;
}

// Against one read of the model's int8 rows.
void against_read(Figure figure, const pz::Model& model, const Work& ours) {
  figure.peer = "one read of the int8 matrix";
  const auto rows = std::as_bytes(model.parts().item_vectors.i8());
  std::uint64_t sum = 0;
  measure(figure, ours, [&] {
    // Vectors, two chains of them: with less, adding up would take longer than reading.
    using Batch = xsimd::batch<std::uint64_t>;
    constexpr std::size_t width = Batch::size * sizeof(std::uint64_t);
    const auto load = [&](std::size_t at) {
      return Batch::load_unaligned(reinterpret_cast<const std::uint64_t*>(rows.data() + at));
    };
    Batch one(std::uint64_t{0}), two(std::uint64_t{0});
    for (std::size_t at = 0; at + 4 * width <= rows.size(); at += 4 * width) {
      one += load(at) + load(at + width);
      two += load(at + 2 * width) + load(at + 3 * width);
    }
    std::array<std::uint64_t, Batch::size> sums;
    (one + two).store_unaligned(sums.data());
    for (const std::uint64_t v : sums) sum += v;
  });
  if (sum == 1) std::puts("");
}

void top_100(std::size_t items, float spread, bool million) {
  const auto model = model_of(items, 64, pz::ElementType::i8, spread);
  const pz::Scorer scorer(*model);
  const auto queries = random_queries(64);
  auto workspace = scorer.make_workspace();
  std::vector<pz::ScoredItem> top;
  std::size_t next = 0, next_peer = 0;
  Figure figure{
      .name = "top_100",
      .data = "N=" + std::to_string(items) + " d=64 int8" +
              (spread > 0 ? ", norms log-normal, sigma " + std::to_string(spread).substr(0, 4)
                          : std::string(", norms alike")),
      .calls = items >= 1'000'000 ? 10 : 50};
  const Work ours = [&] {
    scorer.top_k(queries[next++ % queries.size()], 100, {}, workspace, top);
  };
  if (million) {
    against_read(figure, *model, ours);
    return;
  }
#if defined(PERSONALIZE_BENCH_FAISS)
  figure.peer = "FAISS IndexFlatIP, Debian's build, f32";
  faiss::IndexFlatIP index(64);
  std::vector<float> rows(items * 64);
  for (std::size_t i = 0; i < items; ++i)
    model->parts().item_vectors.row(i, {rows.data() + i * 64, 64});
  index.add(static_cast<faiss::Index::idx_t>(items), rows.data());
  std::vector<float> distances(100);
  std::vector<faiss::Index::idx_t> labels(100);
  measure(figure, ours, [&] {
    index.search(1, queries[next_peer++ % queries.size()].data(), 100, distances.data(),
                 labels.data());
  });
#else
  (void)next_peer;
  measure(figure, ours);
#endif
}

// Of a model trained on a million items (million.py), for the users whose histories lie beside it.
void top_100_trained() {
  const std::string folder = "build/million/";
  const auto model = pz::Model::load(folder + "model.pzm");
  std::ifstream histories(folder + "histories.txt");
  if (!model || !histories) {
    std::fprintf(stderr, "top_100_trained: bench/run top_100_trained makes what it needs\n");
    return;
  }
  const pz::Encoder encoder(**model);
  auto steps = encoder.make_workspace();
  std::vector<std::vector<float>> queries;
  for (std::string history; std::getline(histories, history);) {
    std::vector<float> state(encoder.state_size());
    std::istringstream items(history);
    for (std::uint32_t item; items >> item;) encoder.step({.item = item}, state, steps);
    const auto query = encoder.query(state);
    queries.emplace_back(query.begin(), query.end());
    queries.back().resize(pz::kernels::padded((*model)->dimension()));
  }
  const pz::Scorer scorer(**model);
  auto workspace = scorer.make_workspace();
  std::vector<pz::ScoredItem> top;
  std::size_t next = 0;
  against_read({.name = "top_100_trained",
                .data = "N=1000000 d=64 int8, trained, hidden states of 1,000 users",
                .calls = 125},
               **model,
               [&] { scorer.top_k(queries[next++ % queries.size()], 100, {}, workspace, top); });
}

// 64 users in one pass against one by one, a user.
void batch_of_64() {
  const auto model = model_of(100'000, 64, pz::ElementType::i8);
  const pz::Scorer scorer(*model);
  const auto queries = random_queries(64);
  auto workspace = scorer.make_workspace();
  std::vector<std::vector<pz::ScoredItem>> tops(64);
  std::vector<pz::Scorer::Query> batch;
  for (std::size_t i = 0; i < tops.size(); ++i) batch.push_back({queries[i], 100, {}, &tops[i]});
  measure(
      {.name = "top_100_batch",
       .data = "64 users together, N=100000 d=64 int8, norms alike, time a user",
       .peer = "64 single queries",
       .calls = 5,
       .per_call = 64},
      [&] { scorer.top_k(batch, workspace); },
      [&] {
        for (std::size_t i = 0; i < tops.size(); ++i)
          scorer.top_k(queries[i], 100, {}, workspace, tops[i]);
      });
}

// One item more in a catalogue of a million, and all biases of one of 100,000 changed, as an update
// does: rows, biases and scorer.
void catalogue_change() {
  constexpr std::size_t d = 64;
  const auto scorer_of = [](const std::shared_ptr<const pz::Model>& model) {
    return pz::Scorer(pz::ItemRows({model, &model->parts().item_vectors}),
                      pz::PagedArray<float>(model, model->parts().biases),
                      pz::usual_query_length(*model));
  };
  const std::vector<float> row(d, 0.1f);
  {
    auto scorer = scorer_of(model_of(1'000'000, d, pz::ElementType::i8));
    std::vector<double> kib;
    const auto add_one = [&] {
      const double before = bytes_in_use();
      pz::ItemRows rows = scorer.rows();
      pz::PagedArray<float> biases = scorer.biases();
      rows.push_back(row);
      biases.push_back(0.1f);
      pz::Scorer next = scorer.changed(std::move(rows), std::move(biases), {});
      kib.push_back((bytes_in_use() - before) / 1024);
      scorer = std::move(next);
    };
    const std::string data = "one item added to N=1000000 d=64 int8";
    measure({.name = "add_item", .data = data}, add_one);
#if defined(__GLIBC__)
    line({.name = "add_item_memory",
          .data = data + ": taken beside the old catalogue",
          .unit = "KiB"},
         quantile(kib, 0.5), quantile(kib, 0.99), 0, 0);
#endif
  }
  auto scorer = scorer_of(model_of(100'000, d, pz::ElementType::i8));
  std::vector<std::uint32_t> all(100'000);
  std::iota(all.begin(), all.end(), 0u);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(all.size());
  for (float& v : values) v = 0.3f * normal(random);
  std::size_t shift = 0;
  measure({.name = "change_biases", .data = "all biases of N=100000 d=64 int8", .calls = 5}, [&] {
    pz::PagedArray<float> biases = scorer.biases();
    shift += 7919;
    for (std::size_t i = 0; i < all.size(); ++i)
      biases.edit(i) = values[(i + shift) % values.size()];
    scorer = scorer.changed(scorer.rows(), std::move(biases), all);
  });
}

void avx2_against_avx512() {
#if defined(PERSONALIZE_DISPATCH)
  std::size_t count = 0;
  const pz::kernels::Table* const* tables = pz::kernels::available(count);
  const auto named = [&](std::string_view name) -> const pz::kernels::Table* {
    for (std::size_t t = 0; t < count; ++t)
      if (tables[t]->name == name) return tables[t];
    return nullptr;
  };
  const auto *newest = named("avx512+vnni"), *older = named("avx2+fma");
  if (!newest || !older) {
    std::fprintf(stderr, "avx2: this processor has no AVX-512 with VNNI to compare with\n");
    return;
  }
  const auto model = model_of(100'000, 64, pz::ElementType::i8);
  const pz::Scorer fast(*model, *newest), slow(*model, *older);
  const auto queries = random_queries(64);
  auto workspace = fast.make_workspace();
  std::vector<pz::ScoredItem> top;
  std::size_t next = 0, next_peer = 0;
  measure(
      {.name = "top_100_avx2",
       .data = "N=100000 d=64 int8, norms alike, AVX2 without VNNI",
       .peer = "AVX-512 with VNNI"},
      [&] { slow.top_k(queries[next++ % queries.size()], 100, {}, workspace, top); },
      [&] { fast.top_k(queries[next_peer++ % queries.size()], 100, {}, workspace, top); });
#endif
}

void step_128() {
  for (const auto type : {pz::ElementType::i8, pz::ElementType::f32}) {
    const auto model = model_of(10'000, 128, type);
    const pz::Encoder encoder(*model);
    std::vector<float> user(encoder.state_size());
    auto workspace = encoder.make_workspace();
    std::uint32_t item = 0;
    measure({.name = "gru_step",
             .data = "hidden 128, " + std::string(pz::name(type)) + " weights",
             .per_call = 100},
            [&] {
              for (int i = 0; i < 100; ++i) {
                encoder.step({.item = item}, user, workspace);
                item = (item + 7919) % 10'000;
              }
            });
  }
}

void step_128_lookup() {
  for (const auto type : {pz::ElementType::i8, pz::ElementType::f32}) {
    const auto model = model_of(10'000, 128, type);
    const pz::Encoder direct(*model), quick(*model, pz::kernels::chosen(), true);
    auto workspace = direct.make_workspace();
    const auto hundred = [&](const pz::Encoder& encoder, std::vector<float>& user) {
      return [&workspace, &encoder, &user, item = std::uint32_t{0}]() mutable {
        for (int i = 0; i < 100; ++i) {
          encoder.step({.item = item}, user, workspace);
          item = (item + 7919) % 10'000;
        }
      };
    };
    std::vector<float> user(quick.state_size()), other(direct.state_size());
    measure({.name = "gru_step_lookup",
             .data = "hidden 128, " + std::string(pz::name(type)) +
                     " weights, 10,000 items, input half of the gates looked up",
             .peer = "the same with it multiplied",
             .per_call = 100},
            hundred(quick, user), hundred(direct, other));
  }
}

void event_and_slate() {
  constexpr std::int64_t start = 1'700'000'000;
  pz::ModelParts parts = parts_of(10'000, 128, pz::ElementType::i8);
  for (std::size_t i = 0; i < 100; ++i)  // to be explored
    parts.statistics[i] = {0, pz::no_timestamp, pz::no_timestamp, start - 86'400};
  const auto made = pz::Model::from_parts(std::move(parts));
  if (!made) std::abort();
  const auto model = *made;
  for (const float weight : {0.0f, 0.3f}) {
    pz::RecommenderOptions options;
    options.exploration_weight = weight;
    auto shop = pz::Recommender::create(model, options);
    if (!shop) std::abort();
    pz::Slate slate;
    std::int64_t now = start;
    std::uint32_t item = 0;
    measure(
        {.name = "event_and_slate_of_25",
         .data = "10,000 items, d=128, seen items excluded, 100 to explore, weight " +
                 std::to_string(weight).substr(0, 3),
         .calls = 200},
        [&] {
          item = (item + 7919) % 10'000;
          if (!shop->record({.user = "u", .item = model->item_id(item), .timestamp = ++now}) ||
              !shop->recommend(
                  {.user = "u", .count = 25, .exclude_interacted = true, .timestamp = now}, slate))
            std::abort();
        });
  }
}

// 64 users together against one by one, a user.
void recommend_64() {
  const auto model = model_of(100'000, 64, pz::ElementType::i8);
  auto shop = pz::Recommender::create(model);
  if (!shop) std::abort();
  const std::int64_t now = 1'700'000'000;
  std::vector<std::string> users;
  for (int u = 0; u < 64; ++u) users.push_back("user " + std::to_string(u));
  std::vector<pz::Request> requests;
  std::uint32_t item = 0;
  for (const std::string& user : users) {
    for (int event = 0; event < 20; ++event) {
      item = (item + 7919) % 100'000;
      if (!shop->record({.user = user, .item = model->item_id(item), .timestamp = now + event}))
        std::abort();
    }
    requests.push_back(
        {.user = user, .count = 25, .exclude_interacted = true, .timestamp = now + 60});
  }
  std::vector<pz::Slate> slates(requests.size());
  measure(
      {.name = "recommend_batch",
       .data =
           "slates of 25 for 64 users together, N=100000 d=64 int8, seen items excluded, time a "
           "user",
       .peer = "64 single requests",
       .calls = 5,
       .per_call = 64},
      [&] {
        if (!shop->recommend(requests, slates)) std::abort();
      },
      [&] {
        for (std::size_t i = 0; i < slates.size(); ++i)
          if (!shop->recommend(requests[i], slates[i])) std::abort();
      });
}

void load() {
  const auto file =
      pz::write_model(parts_of(1'000'000, 64, pz::ElementType::i8), {.zstd_level = 3});
  if (!file) std::abort();
  const auto sections = pz::list_sections(*file);
  if (!sections) std::abort();
  measure(
      {.name = "load",
       .data = "1,000,000 x 64 int8, from memory",
       .unit = "us",
       .peer = "zstd alone on the same sections",
       .calls = 1},
      [&] {
        if (!pz::Model::from_bytes(*file)) std::abort();
      },
      [&] {
        for (const auto& section : *sections) {
          std::vector<char> raw(section.raw_size);
          const std::uint64_t chunks = section.chunk_count();
          const auto* entry = file->data() + section.offset;
          const auto* stored = entry + chunks * 12;
          for (std::uint64_t c = 0; c < chunks; ++c, entry += 12) {
            std::uint32_t size;
            std::memcpy(&size, entry, 4);
            const std::uint64_t at = c * section.chunk_raw_size();
            const std::uint64_t left =
                std::min<std::uint64_t>(section.raw_size - at, section.chunk_raw_size());
            if (size < left)
              ZSTD_decompress(raw.data() + at, left, stored, size);
            else
              std::memcpy(raw.data() + at, stored, size);
            stored += size;
          }
        }
      });
}

void load_memory() {
  const std::string path =
      "/tmp/personalize_figures_" +
      std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()) + ".pzm";
  if (!pz::save_model(parts_of(1'000'000, 64, pz::ElementType::i8), path, {.zstd_level = 3}))
    std::abort();
  const double before = resident();
  {
    // The peak starts again from here.
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> reset(
        std::fopen("/proc/self/clear_refs", "w"), std::fclose);
    if (!reset || std::fputs("5", reset.get()) < 0) std::abort();
  }
  const auto model = pz::Model::load(path);
  if (!model) std::abort();
  const double peak = status_bytes("VmHWM") - before, final = resident() - before;
  std::remove(path.c_str());
  line({.name = "load_memory",
        .data = "1,000,000 x 64 int8, from a file: growth of the resident set, at most",
        .unit = "MiB",
        .peer = "the model once loaded"},
       mebibytes(peak), mebibytes(peak), mebibytes(final), peak / final);
}

// What exploration at weight 0.3, its propensities and its entry in the slate log add to a slate at
// weight 0: medians of rounds that alternate.
void exploration_added() {
  constexpr std::size_t items = 10'000, young = 1'000;
  constexpr std::int64_t now = 1'700'000'000, day = 86'400;
  pz::ModelParts parts = parts_of(items, 64, pz::ElementType::i8);
  for (std::size_t i = 0; i < items; ++i) {
    parts.statistics[i].interactions = i < young ? 0 : 100;
    parts.statistics[i].creation_timestamp = now - (i < young ? day : 365 * day);
    parts.statistics[i].last_timestamp = now;
  }
  auto model = pz::Model::from_parts(std::move(parts));
  if (!model) std::abort();
  std::vector<pz::Recommender> shops;
  for (const float weight : {0.3f, 0.0f}) {
    auto shop =
        pz::Recommender::create(*model, {.exploration_weight = weight, .update_interval = {}});
    if (!shop) std::abort();
    for (int user = 0; user < 100; ++user)
      for (int event = 0; event < 10; ++event)
        if (!shop->record({.user = "u" + std::to_string(user),
                           .item = (*model)->item_id(static_cast<std::uint32_t>(
                               (user * 7919 + event * 104'729) % static_cast<int>(items))),
                           .timestamp = now}))
          std::abort();
    shops.push_back(std::move(*shop));
  }
  pz::Slate slate;
  std::array<std::vector<double>, 2> times;
  std::vector<double> added;
  for (int round = 0; round < 40; ++round) {
    std::array<std::vector<double>, 2> now_times;
    for (int call = 0; call < 100; ++call)
      for (std::size_t shop = 0; shop < 2; ++shop) {
        const std::string user = "u" + std::to_string(call);
        now_times[shop].push_back(microseconds([&] {
          if (!shops[shop].recommend({.user = user, .count = 25, .timestamp = now}, slate))
            std::abort();
        }));
      }
    if (round < 4) continue;  // warms caches and pages
    added.push_back(quantile(now_times[0], 0.5) - quantile(now_times[1], 0.5));
    for (std::size_t shop = 0; shop < 2; ++shop)
      times[shop].insert(times[shop].end(), now_times[shop].begin(), now_times[shop].end());
  }
  std::printf(R"({"name": "exploration_added", "data": "slate of 25, pool of 1,000, 10,000 items, )"
              R"(d=64, weight 0.3 less weight 0", "value": %.4g, "unit": "us", "with": %.4g, )"
              R"("without": %.4g})"
              "\n",
              quantile(added, 0.5), quantile(times[0], 0.5), quantile(times[1], 0.5));
  std::fflush(stdout);
}

// Impressions as they come: slates of 25 random items, on two threads at once.
void counter_increments() {
  constexpr std::uint32_t items = 100'000;
  constexpr std::size_t slate = 25, slates = 40'000, threads = 2;
  pz::ItemCounters counters(items);
  const pz::DecayMoment moment = pz::Decay(14 * 86'400).at(1'700'000'000);
  std::array<std::vector<std::uint32_t>, threads> shown;
  for (std::size_t t = 0; t < threads; ++t) {
    std::mt19937 random(static_cast<unsigned>(t));
    for (std::size_t i = 0; i < slate * slates; ++i)
      shown[t].push_back(static_cast<std::uint32_t>(random() % items));
  }
  std::vector<double> rates;
  for (int round = 0; round < 21; ++round) {
    std::array<double, threads> seconds{};
    std::atomic<std::size_t> ready{0};
    std::vector<std::thread> writers;
    for (std::size_t t = 0; t < threads; ++t)
      writers.emplace_back([&, t] {
#if defined(__linux__)
        // bench/run pins the process to one core; this figure is of two.
        cpu_set_t core;
        CPU_ZERO(&core);
        CPU_SET(t, &core);
        pthread_setaffinity_np(pthread_self(), sizeof core, &core);
#endif
        ++ready;
        while (ready < threads) {
        }
        const auto begin = std::chrono::steady_clock::now();
        for (std::size_t s = 0; s < slates; ++s) {
          const std::uint32_t* slate_items = shown[t].data() + s * slate;
          for (std::size_t i = 0; i < slate; ++i) counters.prefetch(slate_items[i]);
          for (std::size_t i = 0; i < slate; ++i)
            counters.add(pz::ItemCounters::Kind::expected, slate_items[i], 0.25, moment);
        }
        seconds[t] =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      });
    for (std::thread& writer : writers) writer.join();
    if (round == 0) continue;
    rates.push_back(static_cast<double>(threads * slate * slates) /
                    *std::max_element(seconds.begin(), seconds.end()) / 1e6);
  }
  line({.name = "counter_increments",
        .data = "100,000 items, 2 threads, slates of 25; p99: the slowest round",
        .unit = "million/s"},
       quantile(rates, 0.5), quantile(rates, 0.0), 0, 0);
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string_view> wanted(arguments + 1, arguments + count);
  const std::vector<std::pair<std::string_view, Work>> figures{
      {"top_100_10k", [] { top_100(10'000, 0, false); }},
      {"top_100_100k", [] { top_100(100'000, 0, false); }},
      {"top_100_1m", [] { top_100(1'000'000, 0, true); }},
      {"top_100_1m_varied",
       [] {
         for (const float spread : {0.35f, 1.0f}) top_100(1'000'000, spread, true);
       }},
      {"top_100_trained", top_100_trained},
      {"top_100_batch", batch_of_64},
      {"top_100_avx2", avx2_against_avx512},
      {"catalogue_change", catalogue_change},
      {"gru_step", step_128},
      {"gru_step_lookup", step_128_lookup},
      {"event_and_slate", event_and_slate},
      {"recommend_batch", recommend_64},
      {"load", load},
      {"load_memory", load_memory},
      {"exploration_added", exploration_added},
      {"counter_increments", counter_increments},
  };
  std::fprintf(stderr, "kernels: %s\n", pz::kernels::chosen().name);
  for (const std::string_view name : wanted)
    if (std::none_of(figures.begin(), figures.end(),
                     [&](const auto& f) { return f.first == name; })) {
      std::fprintf(stderr, "figures: no figure '%.*s'; there are:", static_cast<int>(name.size()),
                   name.data());
      for (const auto& f : figures) std::fprintf(stderr, " %s", f.first.data());
      std::fputs("\n", stderr);
      return 2;
    }
  for (const auto& [name, run] : figures)
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end()) run();
  return 0;
}
