#!/usr/bin/env bash
# The README: its first lines of code are those of the example they name, all its C++ compiles with
# all warnings, and what it links to is there.
# usage: readme.sh COMPILER
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
fail() {
  echo "$*" >&2
  exit 1
}

awk -v out="$out" '/^```cpp$/ {file = out "/block" ++n; next} /^```$/ {file = ""} file {print >file}' "$root/README.md"
[[ -s $out/block1 && -s $out/block2 ]] || fail "no C++ found in the README"
sed -n '/twelve lines: begin/,/twelve lines: end/{/twelve lines/d;s/^  //p}' "$root/examples/first_slate.cpp" |
  diff - "$out/block1" || fail "the README shows other lines than examples/first_slate.cpp"
{
  echo '#include <optional>'
  echo '#include <span>'
  echo '#include "personalize_runtime.hpp"'
  echo 'namespace pz = personalize;'
  echo 'int fail(const pz::Error&); void show(std::string_view, float, std::string_view);'
  for block in "$out"/block*; do
    name=$(basename "$block")
    echo "int $name(const std::string&, const std::string&, std::span<const char*>, std::int64_t,"
    echo '    std::optional<pz::Recommender>&, const pz::Slate*);'
    echo "int $name([[maybe_unused]] const std::string& file, [[maybe_unused]] const std::string& user,"
    echo '    [[maybe_unused]] std::span<const char*> arguments, [[maybe_unused]] std::int64_t now,'
    echo '    [[maybe_unused]] std::optional<pz::Recommender>& given, [[maybe_unused]] const pz::Slate* other) {'
    grep -q 'auto recommender' "$block" || echo 'auto& recommender = given;'
    cat "$block"
    echo 'return 0; }'
  done
} >"$out/readme.cpp"
"$1" -std=c++20 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -fsyntax-only \
  -DPERSONALIZE_DECLARATIONS_ONLY -I "$root" "$out/readme.cpp"

# [text](file#part): of this repository; a part is a heading in lower case with - for blanks.
for page in README.md bench/README.md; do
  grep -o '](\([^)]*\))' "$root/$page" | sed 's/^](//; s/)$//' | sort -u >"$out/links"
  while read -r link; do
    [[ $link == *://* ]] && continue
    file=${link%%#*}
    target=$root/$(dirname "$page")/$file
    [[ -n $file ]] || target=$root/$page
    [[ -e $target ]] || fail "$page links to $link, which is not there"
    [[ $link == *#* ]] || continue
    grep -qx -- "${link#*#}" < <(sed -n 's/^##* //p' "$target" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9_\n-') ||
      fail "$page links to $link; there is no such heading"
  done <"$out/links"
done
