// What `personalize train` runs.
#include "command/command.hpp"
#include "train/train.hpp"

int main(int argc, char** argv) {
  return personalize::tools::run(argc, argv, {personalize::tools::add_train});
}
