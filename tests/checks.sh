# What tests of commands have in common; to be sourced.

fail() {
  echo "FAILED: $*" >&2
  exit 1
}
# refuses STATUS PATTERN COMMAND...: that exit status, and one line on stderr with the pattern.
refuses() {
  local status=0 want=$1 pattern=$2
  shift 2
  "$@" >out 2>err || status=$?
  ((status == want)) || fail "$* ended with $status instead of $want: $(cat err)"
  (($(wc -l <err) == 1)) || fail "$* wrote $(wc -l <err) lines: $(cat err)"
  grep -q -- "$pattern" err || fail "$* did not say '$pattern': $(cat err)"
}
