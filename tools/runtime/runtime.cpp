// The bodies of personalize_runtime.hpp, for programs whose units see its declarations only.
#define PERSONALIZE_IMPLEMENTATION
#include "personalize_runtime.hpp"
