// Random calls, crashes at random moments, and whether what is opened again is the same, bit for
// bit. usage: exact FOLDER [CALLS [SEED]]: so many calls in each setting (default 100,000)
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../exactness.hpp"

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const auto calls =
      static_cast<std::uint32_t>(argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 100'000);
  const std::uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  const std::string folder = argv[1];
  std::filesystem::create_directories(folder);
  int failed = 0;
  for (const auto& setting : exactness::settings()) {
    const std::string difference = exactness::check(setting, seed, calls, 20, folder);
    failed += !difference.empty();
    std::printf("%-24s %u calls, 20 crashes: %s\n", setting.name, calls,
                difference.empty() ? "identical" : difference.c_str());
    std::fflush(stdout);
  }
  return failed == 0 ? 0 : 1;
}
