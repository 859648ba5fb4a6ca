// What the tools say to what they do not take.
#pragma once

#include <string>

#include "../tools/command/command.hpp"

// The message of the Failure that act() throws.
inline std::string refusal(auto&& act) {
  try {
    act();
  } catch (const personalize::tools::Failure& failure) {
    return failure.what();
  }
  return "nothing was refused";
}
