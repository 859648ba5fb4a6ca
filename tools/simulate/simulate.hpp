// `personalize simulate`: policies compared in a simulated world, or a generated data set.
#pragma once

#include <cstdint>
#include <string>

#include "command/command.hpp"
#include "simulate/world.hpp"

namespace personalize::tools {

struct SimulationOptions {
  std::uint32_t users = 1000, items = 500, days = 60;
  std::uint64_t seed = 1;
};

// Writes interactions.csv, items.csv and users.csv into `directory` (made where missing). The same
// options give the same bytes everywhere. Throws Failure.
//
// Items come in series within genres and appear over time; a user likes a few genres, drifts
// between them, and mostly goes on with the next part of a series just begun: order matters, not
// only taste. IMPRESSION holds the items among which the user chose.
void write_dataset(const SimulationOptions& options, const std::string& directory);

// The same files of a world in which policies are compared (world.hpp): the events before its
// start, then every click on the slates of `policy`, with the slate as its IMPRESSION.
void write_world(const std::string& policy, const WorldOptions& options, double weight,
                 const std::string& directory, class Progress* progress = nullptr);

void add_simulate(CLI::App& app);

}  // namespace personalize::tools
