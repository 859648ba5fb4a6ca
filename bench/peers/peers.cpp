// Exact top-100 here against FAISS and hnswlib on the same vectors and queries, one thread. Prints
// a JSON line a peer; rounds of ours and the peer's alternate, ratio is the median of the rounds'
// ratios. Writes the vectors and queries to FOLDER for the peers in other languages.
// usage: peers FOLDER [N...]
#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexScalarQuantizer.h>
#include <hnswlib/hnswlib.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

namespace {

constexpr std::size_t d = 64, k = 100, query_count = 64;
using Items = std::vector<std::uint32_t>;
using Search = std::function<void(const float* query, Items& found)>;

double microseconds(const Search& search, const float* query, Items& found) {
  const auto begin = std::chrono::steady_clock::now();
  search(query, found);
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
      .count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

class Contest {
 public:
  explicit Contest(std::size_t items) : items_(items), vectors_(pz::Matrix::zeros(items, d)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& v : vectors_.f32()) v = normal(random) / 8;
    vectors_ = vectors_.quantised();
    rows_.resize(items * d);
    for (std::size_t i = 0; i < items; ++i) vectors_.row(i, {rows_.data() + i * d, d});
    queries_.resize(query_count * d);
    for (float& v : queries_) v = normal(random);
    biases_.resize(items);
    scorer_.emplace(vectors_, biases_, 8.0f);
    workspace_ = scorer_->make_workspace();
    for (std::size_t q = 0; q < query_count; ++q) {
      ours(queries_.data() + q * d, found_);
      std::sort(found_.begin(), found_.end());
      exact_.push_back(found_);
    }
  }

  const std::vector<float>& rows() const { return rows_; }

  void save(const std::string& folder) const {
    const auto write = [&](const std::string& name, const std::vector<float>& values) {
      std::ofstream(folder + "/" + name, std::ios::binary)
          .write(reinterpret_cast<const char*>(values.data()),
                 static_cast<std::streamsize>(values.size() * sizeof(float)));
    };
    write("vectors_" + std::to_string(items_) + ".f32", rows_);
    write("queries.f32", queries_);
  }

  double recall(const Search& search) {
    std::size_t hits = 0;
    for (std::size_t q = 0; q < query_count; ++q) {
      search(queries_.data() + q * d, found_);
      for (const std::uint32_t item : found_)
        hits += std::binary_search(exact_[q].begin(), exact_[q].end(), item);
    }
    return static_cast<double>(hits) / static_cast<double>(query_count * k);
  }

  void against(const char* peer, const Search& search) {
    const double part = recall(search);
    std::vector<double> all, peer_all, ratios;
    const std::size_t calls = items_ >= 1'000'000 ? 5 : query_count;
    for (int round = 0; round < 6; ++round) {
      std::vector<double> a, b;
      for (std::size_t q = 0; q < calls; ++q)
        a.push_back(microseconds([this](const float* v, Items& f) { ours(v, f); },
                                 queries_.data() + q * d, found_));
      for (std::size_t q = 0; q < calls; ++q)
        b.push_back(microseconds(search, queries_.data() + q * d, found_));
      if (round == 0) continue;  // warms caches and pages
      all.insert(all.end(), a.begin(), a.end());
      peer_all.insert(peer_all.end(), b.begin(), b.end());
      ratios.push_back(median(a) / median(b));
    }
    std::printf(
        R"({"name": "top_100_peer", "data": "N=%zu d=64, norms alike", "items": %zu, "value": %.4g, )"
        R"("unit": "us", "peer": "%s", "peer_value": %.4g, "ratio": %.3g, "recall": %.3f})"
        "\n",
        items_, items_, median(all), peer, median(peer_all), median(ratios), part);
    std::fflush(stdout);
  }

 private:
  void ours(const float* query, Items& found) {
    scorer_->top_k({query, d}, k, {}, workspace_, top_);
    found.clear();
    for (const pz::ScoredItem& scored : top_) found.push_back(scored.item);
  }

  std::size_t items_;
  pz::Matrix vectors_;
  std::vector<float> rows_, queries_, biases_;
  std::optional<pz::Scorer> scorer_;
  pz::Scorer::Workspace workspace_;
  std::vector<pz::ScoredItem> top_;
  Items found_;
  std::vector<Items> exact_;
};

Search faiss_search(const faiss::Index& index) {
  return [&index, distances = std::vector<float>(k), labels = std::vector<faiss::Index::idx_t>(k)](
             const float* query, Items& found) mutable {
    index.search(1, query, k, distances.data(), labels.data());
    found.clear();
    for (const auto label : labels)
      if (label >= 0) found.push_back(static_cast<std::uint32_t>(label));
  };
}

void contest(std::size_t items, const std::string& folder) {
  Contest contest(items);
  contest.save(folder);
  const auto n = static_cast<faiss::Index::idx_t>(items);
  const float* rows = contest.rows().data();
  {
    faiss::IndexFlatIP index(d);
    index.add(n, rows);
    contest.against("FAISS flat f32", faiss_search(index));
  }
  {
    faiss::IndexScalarQuantizer index(d, faiss::ScalarQuantizer::QT_8bit,
                                      faiss::METRIC_INNER_PRODUCT);
    index.train(n, rows);
    index.add(n, rows);
    contest.against("FAISS SQ8", faiss_search(index));
  }
  {
    const std::size_t lists = items <= 10'000 ? 128 : items <= 100'000 ? 512 : 1024;
    faiss::IndexFlatIP quantizer(d);
    faiss::IndexIVFFlat index(&quantizer, d, lists, faiss::METRIC_INNER_PRODUCT);
    index.cp.niter = 4;
    index.cp.max_points_per_centroid = 64;
    index.train(n, rows);
    index.add(n, rows);
    for (index.nprobe = lists / 16;; index.nprobe = index.nprobe * 5 / 4)
      if (index.nprobe >= lists || contest.recall(faiss_search(index)) >= 0.95) break;
    contest.against("FAISS IVF", faiss_search(index));
  }
  if (items > 100'000) return;  // building the graph of a million takes the better part of an hour
  hnswlib::InnerProductSpace space(d);
  hnswlib::HierarchicalNSW<float> graph(&space, items, 24, 100);
  for (std::size_t i = 0; i < items; ++i) graph.addPoint(rows + i * d, i);
  const Search search = [&graph](const float* query, Items& found) {
    auto nearest = graph.searchKnn(query, k);
    found.clear();
    for (; !nearest.empty(); nearest.pop())
      found.push_back(static_cast<std::uint32_t>(nearest.top().second));
  };
  for (const std::size_t ef : {100u, 200u, 400u, 800u, 1600u, 3200u, 6400u, 12'800u}) {
    graph.setEf(ef);
    if (contest.recall(search) >= 0.95) break;
  }
  contest.against("hnswlib", search);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fputs("usage: peers FOLDER [N...]\n", stderr);
    return 2;
  }
  std::vector<std::size_t> sizes;
  for (int a = 2; a < count; ++a) sizes.push_back(std::strtoul(arguments[a], nullptr, 10));
  if (sizes.empty()) sizes = {10'000, 100'000, 1'000'000};
  for (const std::size_t items : sizes) contest(items, arguments[1]);
  return 0;
}
