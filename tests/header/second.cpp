#include "personalize_runtime.hpp"

std::uint64_t hash_in_second();
personalize::Errc load_in_second(const char* path);

std::uint64_t hash_in_second() { return personalize::xxh64({}); }

personalize::Errc load_in_second(const char* path) {
  const auto model = personalize::Model::load(path);
  if (!model) return model.error().code;
  const auto recommender = personalize::Recommender::create(*model);
  return recommender ? personalize::Errc::format : recommender.error().code;
}
