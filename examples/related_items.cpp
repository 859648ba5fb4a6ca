// Related items: those whose vectors point where this item's does.
// usage: related_items MODEL.pzm ITEM [COUNT]
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "related_items: %s\n", message.c_str());
  return 1;
}

class RelatedItems {
 public:
  // In a server: of Recommender::model(), which has the items that came in, and anew after updates
  // that added some.
  explicit RelatedItems(std::shared_ptr<const pz::Model> model)
      : model_(std::move(model)), vectors_(model_->item_count() * model_->dimension()) {
    for (std::uint32_t item = 0; item < model_->item_count(); ++item) {
      const std::span<float> vector = row(item);
      model_->parts().item_vectors.row(item, vector);
      const float square = std::inner_product(vector.begin(), vector.end(), vector.begin(), 0.0f);
      for (float& v : vector) v /= square > 0 ? std::sqrt(square) : 1;
    }
  }

  // The nearest `count` by cosine, best first. O(items x d).
  std::vector<std::pair<std::string_view, float>> of(std::uint32_t item, std::size_t count) {
    std::vector<std::pair<std::string_view, float>> all;
    const std::span<const float> wanted = row(item);
    for (std::uint32_t other = 0; other < model_->item_count(); ++other)
      if (other != item)
        all.emplace_back(model_->item_id(other), std::inner_product(wanted.begin(), wanted.end(),
                                                                    row(other).begin(), 0.0f));
    count = std::min(count, all.size());
    std::partial_sort(all.begin(), all.begin() + std::ptrdiff_t(count), all.end(),
                      [](const auto& a, const auto& b) { return a.second > b.second; });
    all.resize(count);
    return all;
  }

 private:
  std::span<float> row(std::uint32_t item) {
    return std::span(vectors_).subspan(item * model_->dimension(), model_->dimension());
  }

  std::shared_ptr<const pz::Model> model_;
  std::vector<float> vectors_;
};

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fputs("usage: related_items MODEL.pzm ITEM [COUNT]\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  std::size_t count = 10;
  if (const std::string_view text = argc == 4 ? arguments[3] : "10";
      std::from_chars(text.data(), text.data() + text.size(), count).ptr !=
      text.data() + text.size())
    return fail("COUNT is no number");
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  const auto item = (*model)->find_item(arguments[2]);
  if (!item) return fail(std::string(arguments[2]) + ": no such item");
  RelatedItems related(*model);
  for (const auto& [id, cosine] : related.of(*item, count))
    std::printf("%s %.4f\n", std::string(id).c_str(), double(cosine));
  return 0;
}
