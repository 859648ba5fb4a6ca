// The `personalize` command: one subcommand a folder. libtorch takes half a second and 100 MB to
// load, so `personalize train` goes on as personalize-train (personalize_train.cpp).
#include <string>
#include <vector>

#include "command/command.hpp"
#include "convert/convert.hpp"
#include "evaluate/evaluate.hpp"
#include "inspect/inspect.hpp"
#include "recommend/recommend.hpp"
#include "simulate/simulate.hpp"
#include "state/state.hpp"
#include "train/train.hpp"

int main(int argc, char** argv) {
  using namespace personalize::tools;
  const std::vector<std::string> arguments = arguments_of(argc, argv);
#ifdef PERSONALIZE_TRAINER_PROGRAM
  if (!arguments.empty() && arguments[0] == "train")
    return become(PERSONALIZE_TRAINER_PROGRAM, arguments);
#endif
  return run(arguments,
             {
#ifdef PERSONALIZE_TRAINER_PROGRAM
                 [](CLI::App& app) { describe(app, "train", train_description); },
#endif
                 add_evaluate, add_recommend, add_inspect, add_convert, add_simulate, add_state});
}
