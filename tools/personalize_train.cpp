// What `personalize train` runs.
#include "command/command.hpp"
#include "train/train.hpp"

int main(int argc, char** argv) {
  using namespace personalize::tools;
  return run(arguments_of(argc, argv), {add_train});
}
