// Training: the manual gradients against libtorch's, the packing of histories, and whole small
// runs.
// clang-format off: libtorch's logging defines CHECK as well, and the last one counts.
#include <ATen/ATen.h>
#undef CHECK
#include <doctest/doctest.h>
#include <sys/resource.h>
// clang-format on

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tools/command/command.hpp"
#include "../tools/data/random.hpp"
#include "../tools/train/checkpoint.hpp"
#include "../tools/train/gru.hpp"
#include "../tools/train/kernels.hpp"
#include "../tools/train/loss.hpp"
#include "../tools/train/network.hpp"
#include "../tools/train/streams.hpp"
#include "../tools/train/trainer.hpp"
#include "parity/agreement.hpp"
#include "strings.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace personalize::tools;
namespace fs = std::filesystem;

double difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

struct GruWeights {
  at::Tensor w_ih, w_hh, b_ih, b_hh;
  GruWeights(std::int64_t in, std::int64_t h)
      : w_ih(at::randn({3 * h, in}).mul_(0.3)),
        w_hh(at::randn({3 * h, h}).mul_(0.3)),
        b_ih(at::randn({3 * h})),
        b_hh(at::randn({3 * h})) {
    for (at::Tensor* t : {&w_ih, &w_hh, &b_ih, &b_hh}) t->requires_grad_(true);
  }
  GruWeights copy() const {
    GruWeights other = *this;
    for (at::Tensor* t : {&other.w_ih, &other.w_hh, &other.b_ih, &other.b_hh})
      *t = t->detach().clone().requires_grad_(true);
    return other;
  }
};

// Item i is always followed by item i + 1; 60 seconds between events.
Dataset cycle(std::uint32_t items, std::size_t users, std::uint32_t length) {
  Dataset data{};
  for (std::uint32_t i = 0; i < items; ++i) {
    REQUIRE(data.item_ids.add("item" + std::to_string(i)));
    data.items.push_back({.creation_timestamp = {}, .interactions = 1, .first = 0, .last = 0});
  }
  for (std::size_t u = 0; u < users; ++u) {
    REQUIRE(data.user_ids.add("user" + std::to_string(u)));
    std::vector<Event> history;
    const auto begin = static_cast<std::uint32_t>(mix(u) % items);
    for (std::uint32_t i = 0; i < length; ++i)
      history.push_back(
          {.item = (begin + i) % items, .event_type = 0, .timestamp = 60 * std::int64_t{i}});
    data.histories.push_back(std::move(history));
    data.interactions += length;
  }
  MetadataColumn parity{.name = "PARITY",
                        .numeric = false,
                        .vocabulary = table_of({"even", "odd"}),
                        .boundaries = {},
                        .values = {}};
  for (std::uint32_t i = 0; i < items; ++i) parity.values.push_back({i % 2});
  data.metadata.push_back(parity);
  return data;
}

TrainOptions small_options(const std::string& output) {
  TrainOptions options;
  options.output = output;
  options.hidden_dimension = 32;
  options.feed_forward = 2;
  options.dropout = 0.1;
  options.learning_rate = 5e-3;
  options.epochs = 8;
  options.threads = 2;
  options.element_type = personalize::ElementType::f32;
  return options;
}

// What training fails with; empty where it does not.
std::string failure_of(const Dataset& data, const TrainOptions& options) {
  try {
    train(data, options);
  } catch (const Failure& failure) {
    return failure.what();
  }
  return {};
}

// Two event types, gaps of all magnitudes, a numeric column beside the categorical one, and five
// items that only the metadata knows.
Dataset varied(std::uint32_t items, std::size_t users) {
  Dataset data = cycle(items, users, 20);
  data.event_types = table_of({"view", "buy"});
  for (std::size_t u = 0; u < users; ++u) {
    std::int64_t timestamp = 1'600'000'000;
    for (std::size_t i = 0; i < data.histories[u].size(); ++i) {
      const std::uint64_t random = mix(u, i);
      timestamp += std::int64_t{1} << random % 24;
      data.histories[u][i].event_type = random >> 32U & 1U;
      data.histories[u][i].timestamp = timestamp;
    }
  }
  MetadataColumn price{
      .name = "PRICE", .numeric = true, .vocabulary = {}, .boundaries = {1, 5}, .values = {}};
  for (std::uint32_t i = 0; i < items + 5; ++i) {
    if (i >= items) {
      REQUIRE(data.item_ids.add("cold" + std::to_string(i)));
      data.items.push_back({.creation_timestamp = 5, .interactions = 0, .first = {}, .last = {}});
      data.metadata[0].values.push_back({i % 2});
    }
    price.values.push_back({i % 3});
  }
  data.metadata.push_back(price);
  return data;
}

// A chunk with one history a row, ending in the last step.
Chunk chunk_of(const std::vector<std::vector<Event>>& histories, std::size_t steps) {
  Chunk chunk;
  chunk.batch = histories.size();
  chunk.steps = steps;
  for (auto* values : {&chunk.item, &chunk.event_type, &chunk.time_gap})
    values->assign(steps * chunk.batch, 0);
  chunk.reset.assign(steps * chunk.batch, 0);
  for (std::size_t h = 0; h < histories.size(); ++h) {
    std::size_t cell = (steps - histories[h].size()) * chunk.batch + h;
    chunk.reset[cell] = 1;
    std::optional<std::int64_t> previous;
    for (const Event& event : histories[h]) {
      chunk.item[cell] = event.item;
      chunk.event_type[cell] = event.event_type;
      chunk.time_gap[cell] =
          personalize::time_gap_bucket(previous, event.timestamp, time_gap_buckets);
      previous = event.timestamp;
      cell += chunk.batch;
    }
  }
  return chunk;
}

}  // namespace

TEST_CASE("the GRU and its gradients equal libtorch's own") {
  at::manual_seed(1);
  constexpr std::int64_t steps = 9, batch = 5, in = 7, h = 11;
  GruWeights w(in, h);
  const at::Tensor x = at::randn({steps, batch, in}).requires_grad_(true);
  const at::Tensor state = at::randn({batch, h}).requires_grad_(true);
  const at::Tensor weighting = at::randn({steps, batch, h});
  const at::Tensor reset = at::zeros({steps, batch}, at::kByte);
  const at::Tensor y = gru(x, state, w.w_ih, w.w_hh, w.b_ih, w.b_hh, reset);
  (y * weighting).sum().backward();

  const GruWeights w2 = w.copy();
  const at::Tensor x2 = x.detach().clone().requires_grad_(true);
  const at::Tensor state2 = state.detach().clone().requires_grad_(true);
  const at::Tensor y2 =
      std::get<0>(at::gru(x2, state2.unsqueeze(0), {w2.w_ih, w2.w_hh, w2.b_ih, w2.b_hh}, true, 1, 0,
                          true, false, false));
  (y2 * weighting).sum().backward();

  CHECK(difference(y, y2) < 1e-5);
  const auto same = [](const at::Tensor& a, const at::Tensor& b) {
    return difference(a.grad(), b.grad()) <
           1e-5 * std::max(1.0, b.grad().abs().max().item<double>());
  };
  CHECK(same(x, x2));
  CHECK(same(state, state2));
  CHECK(same(w.w_ih, w2.w_ih));
  CHECK(same(w.w_hh, w2.w_hh));
  CHECK(same(w.b_ih, w2.b_ih));
  CHECK(same(w.b_hh, w2.b_hh));
}

TEST_CASE("a reset inside a chunk equals two separate runs, gradients included") {
  at::manual_seed(2);
  constexpr std::int64_t steps = 8, batch = 2, h = 6;
  GruWeights w(h, h);
  const at::Tensor x = at::randn({steps, batch, h}).requires_grad_(true);
  const at::Tensor state = at::randn({batch, h});
  const at::Tensor weighting = at::randn({steps, batch, h});
  at::Tensor reset = at::zeros({steps, batch}, at::kByte);
  reset[3][1] = 1;
  reset[0][0] = 1;
  const at::Tensor y = gru(x, state, w.w_ih, w.w_hh, w.b_ih, w.b_hh, reset);
  (y * weighting).sum().backward();
  const at::Tensor x_gradient = x.grad().clone();
  const at::Tensor w_gradient = w.w_hh.grad().clone();
  x.mutable_grad() = at::Tensor();
  w.w_hh.mutable_grad() = at::Tensor();

  const auto run = [&](std::int64_t sequence, std::int64_t begin, std::int64_t end,
                       const at::Tensor& initial) {
    return gru(x.slice(0, begin, end).narrow(1, sequence, 1), initial, w.w_ih, w.w_hh, w.b_ih,
               w.b_hh, at::zeros({end - begin, 1}, at::kByte));
  };
  const at::Tensor zero = at::zeros({1, h});
  const at::Tensor first = run(0, 0, steps, zero);
  const at::Tensor second =
      at::cat({run(1, 0, 3, state.narrow(0, 1, 1)), run(1, 3, steps, zero)}, 0);
  const at::Tensor separate = at::cat({first, second}, 1);
  (separate * weighting).sum().backward();
  CHECK(difference(y, separate) < 1e-6);
  CHECK(difference(x_gradient, x.grad()) < 1e-5);
  CHECK(difference(w_gradient, w.w_hh.grad()) < 1e-5);
}

TEST_CASE("cross-entropy by blocks equals torch's, gradients included, and skips empty cells") {
  at::manual_seed(3);
  constexpr std::int64_t n = 23, items = 101, d = 8;
  const at::Tensor hidden = at::randn({n, d}).requires_grad_(true);
  const at::Tensor vectors = at::randn({items, d}).requires_grad_(true);
  const at::Tensor bias = at::randn({items}).requires_grad_(true);
  at::Tensor target = at::randint(items, {n}, at::kLong);
  target[4] = -1;
  target[22] = -1;
  for (const std::int64_t rows : {1, 7, 23, 0}) {
    const at::Tensor loss = catalogue_cross_entropy(hidden, vectors, bias, target, rows);
    (loss * 2).backward();
    const std::vector<at::Tensor> gradients{hidden.grad(), vectors.grad(), bias.grad()};
    for (const at::Tensor* t : {&hidden, &vectors, &bias}) t->mutable_grad() = at::Tensor();
    const at::Tensor expected =
        at::cross_entropy_loss(at::linear(hidden, vectors, bias), target, {}, 1 /* mean */, -1);
    (expected * 2).backward();
    CHECK(difference(loss, expected) < 1e-5);
    CHECK(difference(gradients[0], hidden.grad()) < 1e-5);
    CHECK(difference(gradients[1], vectors.grad()) < 1e-5);
    CHECK(difference(gradients[2], bias.grad()) < 1e-5);
    for (const at::Tensor* t : {&hidden, &vectors, &bias}) t->mutable_grad() = at::Tensor();
  }
}

TEST_CASE("dropout keeps the mean, drops the wanted share, and its gradient has the same mask") {
  const at::Tensor x = at::ones({300, 333}).requires_grad_(true);
  const at::Tensor y = seeded_dropout(x, 0.3, 42);
  y.sum().backward();
  CHECK(std::abs(y.mean().item<double>() - 1) < 0.01);
  CHECK(std::abs((y == 0).to(at::kFloat).mean().item<double>() - 0.3) < 0.01);
  CHECK(at::equal(x.grad(), y.detach()));
  CHECK_FALSE(at::equal(y, seeded_dropout(x, 0.3, 43)));
}

TEST_CASE("streams cover each event exactly once, with a reset where a history begins") {
  std::vector<std::vector<Event>> histories;
  std::size_t events = 0;
  for (std::uint32_t u = 0; u < 37; ++u) {
    histories.emplace_back();
    const std::size_t n = static_cast<std::size_t>(mix(u) % 40);
    for (std::uint32_t i = 0; i < n; ++i)
      histories.back().push_back(
          {.item = u * 1000 + i, .event_type = i % 3, .timestamp = std::int64_t{i} * i});
    if (n >= 2) events += n - 1;
  }
  const std::vector<std::span<const Event>> spans(histories.begin(), histories.end());
  for (const std::size_t batch : {1UL, 4UL, 16UL})
    for (const std::size_t bptt : {2UL, 7UL, 32UL}) {
      const Streams streams(spans, batch, bptt, 9, 1);
      CHECK(streams.events() == events);
      std::map<std::int64_t, int> seen;
      std::vector<std::int64_t> expected(batch, -1);  // the item that goes on in each stream
      std::size_t cells = 0;
      std::size_t cut = 0;
      for (std::size_t c = 0; c < streams.chunks(); ++c) {
        const Chunk chunk = streams.chunk(c);
        CHECK(chunk.steps <= bptt);
        cells += chunk.steps * batch;
        for (std::size_t cell = 0; cell < chunk.steps * batch; ++cell) {
          if (chunk.target[cell] < 0) continue;
          const std::int64_t item = chunk.item[cell];
          ++seen[item];
          CHECK(chunk.target[cell] == item + 1);
          CHECK(chunk.event_type[cell] == item % 1000 % 3);
          CHECK((chunk.time_gap[cell] == 0) == (item % 1000 == 0));
          if (chunk.reset[cell] == 0) CHECK(item == expected[cell % batch]);
          if (item % 1000 == 0) CHECK(chunk.reset[cell] == 1);
          if (chunk.reset[cell] == 1 && item % 1000 != 0) ++cut;
          expected[cell % batch] = item + 1;
        }
      }
      CHECK(seen.size() == events);
      CHECK(std::all_of(seen.begin(), seen.end(), [](const auto& s) { return s.second == 1; }));
      CHECK(cells - events < batch);
      CHECK(cut < batch);
    }
}

TEST_CASE("streams are the same for the same seed and epoch and others for another epoch") {
  const Dataset data = cycle(30, 40, 12);
  const std::vector<std::span<const Event>> spans(data.histories.begin(), data.histories.end());
  const auto items = [&](std::uint64_t seed, std::uint64_t epoch) {
    return Streams(spans, 4, 8, seed, epoch).chunk(1).item;
  };
  CHECK(items(1, 1) == items(1, 1));
  CHECK(items(1, 1) != items(1, 2));
  CHECK(items(1, 1) != items(2, 1));
}

TEST_CASE("training learns that item i is followed by item i + 1") {
  const TemporaryFolder folder;
  const Dataset data = cycle(40, 300, 14);
  TrainOptions options = small_options(folder.file("cycle.pzm"));
  const TrainSummary summary = train(data, options);
  CHECK(summary.validation.recall10 > 0.99);
  CHECK(summary.validation.ndcg10 > 0.95);
  CHECK(summary.best_epoch > 0);
  CHECK(fs::exists(options.output));
  CHECK_FALSE(fs::exists(summary.checkpoint));
  options.resume = true;
  CHECK(failure_of(data, options).find("nothing to resume") != std::string::npos);
}

TEST_CASE(
    "a run interrupted anywhere and resumed writes the same model, bit for bit, as an "
    "uninterrupted one") {
  const TemporaryFolder folder;
  const Dataset data = cycle(40, 120, 10);
  TrainOptions options = small_options(folder.file("whole.pzm"));
  options.epochs = 3;
  options.layers = 2;
  options.time_gap = TimeGap::on;
  const TrainSummary whole = train(data, options);
  const std::string expected = bytes_of(options.output);
  REQUIRE(expected.size() > 1000);

  options.output = folder.file("parts.pzm");
  int pieces = 0;
  TrainSummary summary;
  do {
    int steps = 0;
    options.interrupted = [&] { return ++steps == 37; };
    summary = train(data, options);
    CHECK(fs::exists(options.output));
    CHECK(fs::exists(summary.checkpoint) == summary.interrupted);
    options.resume = true;
    ++pieces;
  } while (summary.interrupted && pieces < 100);
  CHECK(pieces > 2);
  CHECK(summary.steps == whole.steps);
  CHECK(summary.validation.ndcg10 == whole.validation.ndcg10);
  CHECK(bytes_of(options.output) == expected);
}

TEST_CASE(
    "resuming with other options or data, or over an unfinished run, is refused with the reason") {
  const TemporaryFolder folder;
  const Dataset data = cycle(40, 120, 10);
  TrainOptions options = small_options(folder.file("model.pzm"));
  options.resume = true;
  CHECK_THROWS_AS(train(data, options), Failure);  // no checkpoint
  options.resume = false;
  options.interrupted = [] { return true; };
  REQUIRE(train(data, options).interrupted);
  CHECK_THROWS_AS(train(data, options), Failure);  // would lose the unfinished run
  options.resume = true;
  TrainOptions other = options;
  other.dropout = 0.2;
  CHECK(failure_of(data, other).find("dropout (0.1, now 0.2)") != std::string::npos);
  CHECK_THROWS_AS(train(cycle(40, 121, 10), options), Failure);
  Checkpoint truncated = load_checkpoint(folder.file("model.pzm.checkpoint"));
  truncated.second_moments.pop_back();
  save_checkpoint(truncated, folder.file("model.pzm.checkpoint"));
  CHECK(failure_of(data, options).find("does not fit the network") != std::string::npos);
  std::ofstream(folder.file("model.pzm.checkpoint"), std::ios::binary) << "not a checkpoint";
  CHECK_THROWS_AS(train(data, options), Failure);
}

TEST_CASE("a checkpoint reads back as it was, and a bit that is flipped anywhere is noticed") {
  const TemporaryFolder folder;
  const std::string path = folder.file("checkpoint");
  Checkpoint written;
  written.recipe = R"({"seed": 1})";
  written.parameters = {at::arange(6, at::kFloat).view({2, 3}), at::ones({1})};
  written.first_moments = written.second_moments = written.parameters;
  written.state = {at::zeros({2, 1, 3})};
  written.epoch = 3;
  written.best_ndcg10 = 0.25;
  save_checkpoint(written, path);
  const Checkpoint read = load_checkpoint(path);
  CHECK(read.recipe == written.recipe);
  CHECK(read.epoch == 3);
  CHECK(read.best_ndcg10 == 0.25);
  REQUIRE(read.parameters.size() == 2);
  CHECK(read.parameters[0].equal(written.parameters[0]));
  CHECK(read.parameters[1].equal(written.parameters[1]));
  CHECK(read.state[0].sizes() == written.state[0].sizes());
  CHECK(read.best_parameters.empty());

  const std::string whole = bytes_of(path);
  const auto refused = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
    try {
      load_checkpoint(path);
    } catch (const Failure& failure) {
      const std::string text = failure.what();
      return text.starts_with(path + ": ") && text.find("damaged") != std::string::npos &&
             text.find("start without --resume") != std::string::npos;
    }
    return false;
  };
  std::size_t missed = 0;
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    if (!refused(flipped)) ++missed;
  }
  CHECK(missed == 0);
  for (std::size_t size = 0; size < whole.size(); ++size)
    if (!refused(whole.substr(0, size))) ++missed;
  CHECK(missed == 0);
  CHECK(refused(whole + '\0'));
  CHECK(refused("PK\x03\x04 an archive that could run code"));
}

TEST_CASE(
    "a checkpoint that cannot be written leaves the old one as it was, and nothing beside it") {
  const TemporaryFolder folder;
  const std::string path = folder.file("checkpoint");
  Checkpoint small, large;
  small.epoch = 1;
  save_checkpoint(small, path);
  large.parameters = {at::ones({100'000})};
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit full { 10'000, before.rlim_max };
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &full) == 0);
  std::string told;
  try {
    save_checkpoint(large, path);
  } catch (const Failure& failure) {
    told = failure.what();
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(told.starts_with(path + ": cannot write: "));
  CHECK(load_checkpoint(path).epoch == 1);
  CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
}

TEST_CASE("a run that had run out of patience when it was cut off only exports on resuming") {
  const TemporaryFolder folder;
  const Dataset data = cycle(40, 120, 10);
  TrainOptions options = small_options(folder.file("model.pzm"));
  options.patience = 3;
  options.interrupted = [] { return true; };
  const std::string path = train(data, options).checkpoint;
  Checkpoint checkpoint = load_checkpoint(path);
  checkpoint.stale_epochs = 3;
  save_checkpoint(checkpoint, path);
  options.resume = true;
  options.interrupted = {};
  CHECK(train(data, options).steps == static_cast<std::uint64_t>(checkpoint.step));
  CHECK_FALSE(fs::exists(path));
}

TEST_CASE("a loss that is no longer finite fails with advice") {
  const TemporaryFolder folder;
  TrainOptions options = small_options(folder.file("model.pzm"));
  options.learning_rate = 1e30;
  options.clip_norm = 0;
  CHECK_THROWS_AS(train(cycle(40, 120, 10), options), Failure);
}

TEST_CASE("items that have only metadata and histories of unequal length train without trouble") {
  const TemporaryFolder folder;
  Dataset data = cycle(40, 60, 9);
  for (int i = 0; i < 5; ++i) {
    REQUIRE(data.item_ids.add("cold" + std::to_string(i)));
    data.items.push_back({.creation_timestamp = 5, .interactions = 0, .first = {}, .last = {}});
    data.metadata[0].values.push_back({1});
  }
  data.metadata[0].values.back().clear();
  data.histories[0].resize(2);
  data.event_types = table_of({"view", "buy"});
  for (auto& history : data.histories)
    for (std::size_t i = 0; i < history.size(); ++i) history[i].event_type = i % 2;
  TrainOptions options = small_options(folder.file("model.pzm"));
  options.epochs = 2;
  options.feed_forward = 0;
  const TrainSummary summary = train(data, options);
  CHECK(summary.items == 45);
  CHECK(fs::exists(options.output));
}

TEST_CASE("the header computes from the exported model what the trainer's own network computes") {
  const TemporaryFolder folder;
  constexpr std::uint32_t items = 120;
  const Dataset data = varied(items, 200);
  TrainOptions options = small_options(folder.file("model.pzm"));
  options.hidden_dimension = 50;
  options.layers = 2;
  int steps = 0;
  options.interrupted = [&] { return ++steps == 30; };  // before a validation chooses parameters
  const TrainSummary summary = train(data, options);
  REQUIRE(summary.interrupted);
  REQUIRE(summary.epochs == 0);

  // The file that was exported, and a network with the parameters of the checkpoint.
  const auto loaded = personalize::Model::load(options.output);
  REQUIRE(loaded.has_value());
  const personalize::Model& model = **loaded;
  const Network network({.trained_items = items,
                         .items = data.item_ids.size(),
                         .dimension = options.hidden_dimension,
                         .layers = options.layers,
                         .feed_forward = options.feed_forward,
                         .event_types = data.event_types.size(),
                         .time_gap_buckets = time_gap_buckets},
                        data.metadata, 99);
  const Checkpoint checkpoint = load_checkpoint(summary.checkpoint);
  REQUIRE(checkpoint.parameters.size() == network.parameters().size());
  for (std::size_t i = 0; i < checkpoint.parameters.size(); ++i)
    at::Tensor(network.parameters()[i].value).detach().copy_(checkpoint.parameters[i]);

  std::vector<std::vector<Event>> histories(1000);
  for (std::size_t h = 0; h < histories.size(); ++h) {
    std::int64_t timestamp = 0;
    for (std::uint64_t i = 0; i < 1 + mix(h) % 60; ++i) {
      const std::uint64_t random = mix(h + 1, i);
      timestamp += std::int64_t{1} << (random >> 8U) % 24;
      histories[h].push_back(
          {.item = static_cast<std::uint32_t>((random >> 16U) % model.item_count()),
           .event_type = static_cast<std::uint32_t>(random & 1U),
           .timestamp = timestamp});
    }
  }
  const at::Tensor vectors = network.all_item_vectors();
  std::vector<at::Tensor> state = network.initial_state(histories.size());
  const at::Tensor hidden = network
                                .encode(vectors, chunk_of(histories, 60), state, 0, std::nullopt,
                                        true /* the last step */)
                                .detach();
  // Items without interactions have no bias of their own: the export chooses it.
  at::Tensor biases = at::zeros({vectors.size(0)});
  std::copy(model.parts().biases.begin() + items, model.parts().biases.end(),
            biases.data_ptr<float>() + items);
  biases.narrow(0, 0, items).copy_(network.biases().detach());
  const at::Tensor expected = at::addmm(biases, hidden, vectors.t());
  const at::Tensor ranked = at::argsort(expected, -1, true).contiguous();

  const personalize::Encoder encoder(model);
  const personalize::Scorer scorer(model);
  auto scoring = scorer.make_workspace();
  auto workspace = encoder.make_workspace();
  parity::Agreement agreement;
  std::vector<float> scores(model.item_count());
  std::vector<personalize::ScoredItem> top;
  for (std::size_t h = 0; h < histories.size(); ++h) {
    std::vector<float> user(encoder.state_size());
    std::optional<std::int64_t> previous;
    for (const Event& event : histories[h]) {
      encoder.step(
          {.item = event.item,
           .event_type = event.event_type,
           .time_gap = personalize::time_gap_bucket(previous, event.timestamp, time_gap_buckets)},
          user, workspace);
      previous = event.timestamp;
    }
    const auto query = encoder.query(user);
    for (std::uint32_t i = 0; i < scores.size(); ++i) scores[i] = scorer.score(query, i);
    scorer.top_k(query, parity::top_count, {}, scoring, top);
    const auto row = [&](const at::Tensor& matrix, auto* values) {
      const auto width = static_cast<std::size_t>(matrix.size(1));
      return std::span(values + h * width, width);
    };
    agreement.add(query.first(model.dimension()), row(hidden, hidden.data_ptr<float>()), scores,
                  row(expected, expected.data_ptr<float>()), top,
                  row(ranked, ranked.data_ptr<std::int64_t>()));
  }
  MESSAGE("hidden ", agreement.hidden_norm, " (norm) ", agreement.hidden_element,
          " (element), score ", agreement.score, ", swapped within ties ", agreement.swapped);
  CHECK(agreement.good());
}
