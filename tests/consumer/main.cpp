#include <personalize_runtime.hpp>

#include <cstdio>

int main() {
  const auto model = personalize::Model::load("no such file.pzm");
  std::puts(model ? "loaded" : model.error().message.c_str());
  return model ? 1 : 0;
}
