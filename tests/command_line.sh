#!/usr/bin/env bash
# The command from end to end on a generated data set, and what it says to bad input.
# usage: tests/command_line.sh PERSONALIZE
set -euo pipefail
personalize=$1
. "$(dirname "$0")/checks.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

field() { python3 -c "import json,sys; print(json.load(open('$1'))$2)"; }

[[ $("$personalize" --version) == "personalize "[0-9]* ]]
[[ $("$personalize" train --help) == *--hidden-dimension* ]]
"$personalize" simulate --write-dataset data --users 300 --items 120
"$personalize" simulate --write-dataset again --users 300 --items 120
cmp data/interactions.csv again/interactions.csv

"$personalize" train data/interactions.csv --items data/items.csv -o model.pzm --epochs 6 \
  --hidden-dimension 32 --seed 5 --patience 0 2>train.log
grep -q '^train: [0-9]* users, 120 items, [0-9]* events an epoch, at most 6 epochs' train.log || fail "no first line: $(cat train.log)"
(($(grep -c '^train: .* epoch [1-6]/6 ' train.log) == 6)) || fail "not a line an epoch: $(cat train.log)"
tail -n 1 train.log | grep -q '^train: done after 6 epochs, loss .* NDCG@10 .*; model.pzm$' || fail "no last line: $(cat train.log)"
"$personalize" train data/interactions.csv --items data/items.csv -o f32.pzm --epochs 6 \
  --hidden-dimension 32 --seed 5 --element-type f32 >/dev/null
"$personalize" evaluate -m model.pzm -i data/interactions.csv --json >int8.json 2>err
[[ ! -s err ]] || fail "evaluate of what was trained for said: $(cat err)"
(($(field int8.json "['known_items']") == $(field int8.json "['items']"))) || fail "items are not known"
"$personalize" evaluate -m f32.pzm -i data/interactions.csv --json --threads 1 >f32.json
"$personalize" evaluate -m model.pzm -i data/interactions.csv --protocol holdout --json >holdout.json 2>err
grep -q 'warning: the model was trained for --protocol leave-one-out' err || fail "no warning of the protocol: $(cat err)"
(($(field holdout.json "['warnings'].__len__()") == 1)) || fail "the warning is not in the JSON"
head -n 2000 data/interactions.csv >part.csv
"$personalize" evaluate -m model.pzm part.csv >part.txt 2>err
grep -q 'warning: the model was trained on other interactions' err || fail "no warning of other data: $(cat err)"
grep -q 'items known to the model' part.txt || fail "evaluate does not count known items"
key="['normalized_discounted_cumulative_gain_at_10']"
python3 - <<CHECK || fail "int8 costs accuracy, or nothing was learnt"
import json
i8, f32 = (json.load(open(f))$key for f in ("int8.json", "f32.json"))
print("NDCG@10 int8", i8, "f32", f32)
assert abs(i8 - f32) < 0.02 and f32 > 0.15, (i8, f32)
CHECK

user=$(sed -n 2p data/interactions.csv | cut -d, -f1)
"$personalize" recommend -m model.pzm -i data/interactions.csv --items data/items.csv -u "$user" \
  -n 7 --json >slate.json
(($(field slate.json "['slate'].__len__()") == 7)) || fail "the slate is short"
"$personalize" recommend -m model.pzm -i data/interactions.csv --all-users -n 3 -o slates.csv
users=$(($(tail -n +2 data/interactions.csv | cut -d, -f1 | sort -u | wc -l)))
(($(wc -l <slates.csv) == users * 3 + 1)) || fail "slates.csv has $(wc -l <slates.csv) lines"
"$personalize" recommend -m model.pzm data/interactions.csv -u nobody >nobody.txt
grep -q 'user nobody has no interactions and no state in the model' nobody.txt || fail "nobody: $(cat nobody.txt)"
grep -q 'slate of popular items' nobody.txt || fail "nobody: $(cat nobody.txt)"
"$personalize" recommend -m model.pzm -u nobody | cmp - nobody.txt
head -n 1 data/interactions.csv >header.csv
"$personalize" recommend -m model.pzm -i header.csv -u nobody | cmp - nobody.txt
# One user with one event, of whose items the model knows some.
printf 'USER_ID,ITEM_ID,TIMESTAMP\nz,i1,1700000000\nz,new,1700000100\n' >one.csv
"$personalize" recommend -m model.pzm -i one.csv -u z >one.txt 2>err
grep -q 'user z, last 2 of 2 interactions, 1 of 2 items known to the model:' one.txt || fail "one user: $(cat one.txt)"
grep -qx slate: one.txt || fail "one user: $(cat one.txt)"
grep -q '1 of 2 items of one.csv are in the model; 1 of 2 interactions' err || fail "no count: $(cat err)"
printf 'USER_ID,ITEM_ID,TIMESTAMP\nz,1,1700000000\ny,2,1700000000\ny,3,1700000001\ny,4,1700000002\n' >foreign.csv
for use in 'recommend -u z' 'recommend --all-users' evaluate; do
  # shellcheck disable=SC2086
  refuses 1 '0 of 4 items of foreign.csv are in the model' "$personalize" $use -m model.pzm -i foreign.csv
done
refuses 1 'items.csv: no column NAME to take titles from; --title-column takes one of ITEM_ID, CREATION_TIMESTAMP, GENRES, PRICE, TITLE' \
  "$personalize" recommend -m model.pzm -u z --items data/items.csv --title-column NAME
printf 'ITEM_ID,TITLE\ni1,One\n' >titles.csv
"$personalize" recommend -m model.pzm -i one.csv -u z -n 5 --items titles.csv >out 2>err
grep -q 'i1  One' out || fail "no title: $(cat out)"
grep -q ' of the 5 items of the slate are not in titles.csv' err || fail "titles were left out in silence: $(cat err)"
refuses 2 'needs --interactions' "$personalize" recommend -m model.pzm --all-users
refuses 2 'give --user ID or --interactions' "$personalize" recommend -m model.pzm
refuses 1 'header.csv: holds no interactions' "$personalize" recommend -m model.pzm -i header.csv --all-users
"$personalize" recommend -m model.pzm -i one.csv 2>/dev/null | cmp - one.txt  # of the first user
gzip -c one.csv >one.csv.gz
"$personalize" recommend -m model.pzm -i one.csv.gz 2>err | cmp - one.txt
grep -q 'one.csv.gz (gzip): 2 interactions' err || fail "recommend does not say that it read gzip: $(cat err)"
"$personalize" inspect model.pzm --json >inspect.json
(($(field inspect.json "['items']") == 120)) || fail "inspect counts the items wrong"
encoder=$(field inspect.json "['fingerprints']['encoder']")
[[ $encoder =~ ^[0-9a-f]{16}$ ]] || fail "inspect shows the fingerprint '$encoder'"
"$personalize" inspect model.pzm | grep -q "^fingerprints: encoder $encoder, items " || fail "inspect shows other fingerprints as text"

head -n 1 data/interactions.csv | grep -qx 'USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE,IMPRESSION'
refuses 2 'needs --log' "$personalize" evaluate --protocol off-policy
refuses 1 'has neither RECOMMENDATION_ID' "$personalize" evaluate --protocol off-policy --log slates.csv
"$personalize" simulate --scenario fast-catalogue --users 50 --items 200 --days 2 --slates 100 \
  --policy runtime --policy greedy --svg plot.svg --json >simulated.json
(($(field simulated.json "['policies'].__len__()") == 2)) || fail "simulate left out a policy"
python3 -c "import xml.dom.minidom; xml.dom.minidom.parse('plot.svg')" || fail "plot.svg is not XML"
"$personalize" simulate --scenario no-fatigue --users 50 --items 200 --days 2 --slates 100 --write-dataset world
"$personalize" simulate --users 50 --items 200 --days 1 --slates 100 --write-log world.csv
[[ $("$personalize" evaluate --protocol off-policy --log world.csv) == *"doubly robust"* ]]
refuses 2 'excludes' "$personalize" simulate --write-log x --policy greedy
refuses 2 'excludes' "$personalize" simulate --write-dataset x --json
refuses 2 'no meaning' "$personalize" simulate --write-dataset x --slates 5
refuses 2 'one --policy' "$personalize" simulate --scenario default --write-dataset x --policy greedy --policy runtime
refuses 2 'no meaning' "$personalize" evaluate --protocol off-policy --log world.csv -m model.pzm
refuses 2 'no meaning' "$personalize" evaluate -m model.pzm -i data/interactions.csv --target-weight 0
refuses 2 'excludes' "$personalize" recommend -m model.pzm -i data/interactions.csv --all-users --json
refuses 2 'excludes' "$personalize" recommend -m model.pzm -i data/interactions.csv -u u1 -o x
"$personalize" evaluate --protocol off-policy --log world.csv --target-weight 1 --json >off.json
[[ $(field off.json "['doubly_robust']['mean'] > 0") == True ]] || fail "weight 1 has no estimate"
{ cat world.csv; printf '1,a\0b,r,i,1,0,1,1,0,-inf,1,1,0\n'; } >nul.csv
refuses 1 'a NUL byte' "$personalize" evaluate --protocol off-policy --log nul.csv
"$personalize" evaluate --protocol off-policy --log nul.csv --skip-bad-rows --json >off.json 2>err
(($(field off.json "['bad_rows']") == 1)) || fail "a bad row was not counted"
grep -q 'skipped 1 bad rows' err || fail "a bad row was not reported: $(cat err)"

# Outputs: standard output that is full, devices, links, signals.
for command in 'inspect model.pzm' 'inspect model.pzm --json' '--version' \
  'recommend -m model.pzm -i data/interactions.csv -u u1' \
  'recommend -m model.pzm -i data/interactions.csv --all-users' \
  'evaluate --protocol off-policy --log world.csv --json' \
  'simulate --users 50 --items 200 --days 1 --slates 100 --policy greedy --json' \
  'convert --from model.pzm -o /dev/stdout'; do
  status=0
  # shellcheck disable=SC2086
  "$personalize" $command >/dev/full 2>err || status=$?
  ((status == 1)) && grep -q 'cannot write' err || fail "$command on a full disk ended with $status: $(cat err)"
done
refuses 1 '/dev/full: cannot write' "$personalize" simulate --users 50 --items 200 --days 1 --slates 100 --policy greedy --svg /dev/full
refuses 1 '/dev/full: cannot write' "$personalize" simulate --users 50 --items 200 --days 1 --slates 100 --write-log /dev/full
refuses 2 'cannot both go to standard output' "$personalize" simulate --svg /dev/stdout
refuses 1 'Read-only\|cannot create' "$personalize" simulate --write-dataset /proc/no
refuses 1 'standard output: cannot write' bash -c '"$0" inspect model.pzm >&-' "$personalize"
# Files that are opened do not take the place of closed streams.
"$personalize" convert --from model.pzm -o closed.pzm >/dev/null
"$personalize" convert --from model.pzm -o unspoilt.pzm >&- 2>&- <&- && fail "a closed stream took what was printed"
cmp closed.pzm unspoilt.pzm
# A reader that went away ends the command as it ends others, without a word.
status=0
{ "$personalize" recommend -m model.pzm -i data/interactions.csv --all-users 2>err || echo $? >status; } | head -n 1 >first.txt
(($(<status) == 141)) && [[ ! -s err ]] || fail "behind head: $(<status), $(cat err)"
grep -q '^USER_ID' first.txt || fail "head got nothing"
(ulimit -f 1; refuses 1 'cannot write: File too large' "$personalize" recommend -m model.pzm -i data/interactions.csv --all-users -o large.csv)
[[ ! -e large.csv && -z $(find . -name '.personalize-*') ]] || fail "a file that may not grow left something behind"
refuses 1 '/dev/full: cannot write' "$personalize" recommend -m model.pzm -i data/interactions.csv --all-users -o /dev/full
refuses 1 '/dev/full: cannot write' "$personalize" convert --from model.pzm -o /dev/full
[[ -c /dev/full ]] || fail "/dev/full was replaced"
"$personalize" convert --from model.pzm -o /dev/stdout 2>/dev/null | cat >piped.pzm
"$personalize" convert --from model.pzm -o copy.pzm >/dev/null
cmp piped.pzm copy.pzm
ln -s copy.pzm link.pzm
"$personalize" convert --from f32.pzm --element-type f32 -o link.pzm >/dev/null
[[ -L link.pzm ]] || fail "a link was replaced"
! cmp -s piped.pzm copy.pzm || fail "a link was not written through"
refuses 2 'name a --checkpoint' "$personalize" train data/interactions.csv -o /dev/null
mkdir signals
python3 - "$personalize" <<'CHECK' || fail "a signal left something behind"
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU):
    running = subprocess.Popen([sys.argv[1], "simulate", "--users", "2000", "--days", "3650",
                                "--write-log", "signals/log.csv"])
    while not os.listdir("signals"):
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait() == 128 + number, running.returncode
    assert not os.listdir("signals"), os.listdir("signals")
CHECK
# Metadata that nests is not shown, and costs no more than its size.
"$personalize" convert --from model.pzm --to safetensors -o model.safetensors >/dev/null
nest() {  # nest DEPTH: a model whose metadata nests so deep
  python3 - "$1" <<'NEST'
import json, struct, sys
depth = int(sys.argv[1])
data = open("model.safetensors", "rb").read()
length = struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8:8 + length])
header["__metadata__"]["metadata"] = "[" * depth + "]" * depth
text = json.dumps(header).encode()
open("nested.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data[8 + length:])
NEST
}
nest 20000
refuses 1 'nests deeper than 64' "$personalize" convert --from nested.safetensors -o nested.pzm
nest 60
"$personalize" convert --from nested.safetensors -o nested.pzm >/dev/null
"$personalize" inspect nested.pzm >nested.txt
grep -q 'not shown: the metadata nests deeper than 32 levels' nested.txt || fail "nested metadata: $(head -c 300 nested.txt)"
(($(wc -c <nested.txt) < 10000)) || fail "nested metadata was printed"
refuses 2 'none of default' "$personalize" simulate --scenario x
refuses 2 'none of runtime' "$personalize" simulate --policy x
refuses 2 '\[0, 1\]' "$personalize" simulate --exploration-weight 2

status=0
"$personalize" 2>err || status=$?
((status == 2)) && grep -q '^  recommend ' err || fail "without arguments: $status, $(cat err)"
"$personalize" help | cmp - err
"$personalize" help recommend | cmp - <("$personalize" recommend --help)
[[ $("$personalize" help train) == *--hidden-dimension* ]]
refuses 2 "^personalize: no subcommand 'traim'; did you mean 'train'? (see personalize --help)" "$personalize" traim
refuses 2 "no subcommand 'eval'; did you mean 'evaluate'" "$personalize" eval x
refuses 2 "no subcommand 'xyzzy'; there are train, evaluate, recommend" "$personalize" xyzzy
refuses 2 "^personalize state: no subcommand 'inspct'; did you mean 'inspect'? (see personalize state --help)" "$personalize" state inspct x
refuses 2 "^personalize state repair: no option '--dry-rum'; did you mean '--dry-run'? (see personalize state repair --help)" "$personalize" state repair x --dry-rum
refuses 2 'subcommand is required' "$personalize" state
refuses 2 'has no meaning with --format jsonl' "$personalize" state export x --format jsonl --session-prefix v
"$personalize" help state repair | cmp - <("$personalize" state repair --help)
for subcommand in inspect verify repair export; do
  refuses 1 "^personalize state $subcommand: none: cannot open" "$personalize" state $subcommand none
done
mkdir empty
refuses 1 'empty: holds no state file' "$personalize" state inspect empty
refuses 1 'empty: holds no state file.*--from COPY.pzs' "$personalize" state repair empty
refuses 1 'model.pzm: neither a state (.pzs) nor a journal (.pzj)' "$personalize" state verify model.pzm
refuses 2 "^personalize evaluate: no option '--modle'; did you mean '--model'? (see personalize evaluate --help)" \
  "$personalize" evaluate --modle model.pzm -i data/interactions.csv
refuses 2 "^personalize train: no option '--iteractions'; did you mean '--interactions'" "$personalize" train --iteractions=x
refuses 2 'not one of leave-one-out, holdout, off-policy' "$personalize" evaluate -m x -i x --protocol all
refuses 2 '\[0, 0.9\]' "$personalize" train data/interactions.csv -o x.pzm --dropout 1.5
refuses 2 '\[32, 256\]' "$personalize" train data/interactions.csv -o x.pzm --hidden-dimension 31
refuses 2 '\[2, 32\]' "$personalize" train data/interactions.csv -o x.pzm --bptt 64
refuses 2 'leave-one-out' "$personalize" train data/interactions.csv -o x.pzm --protocol x
refuses 1 'none.csv: cannot open' "$personalize" train none.csv -o x.pzm
csv() { printf "$1" >bad.csv; }
train=("$personalize" train bad.csv -o x.pzm --epochs 1)
csv ''
refuses 1 'bad.csv: the file is empty' "${train[@]}"
csv 'USER_ID,ITEM_ID,TIMESTAMP\n'
refuses 1 'bad.csv: holds no interactions' "${train[@]}"
csv 'USER_ID,TIMESTAMP\nu,1\n'
refuses 1 'bad.csv:1: no column ITEM_ID' "${train[@]}"
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,i,12x\n'
refuses 1 "bad.csv:2: column TIMESTAMP: '12x'" "${train[@]}"
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,i,1700000000000\n'
refuses 1 'looks like milliseconds' "${train[@]}"
csv "USER_ID,ITEM_ID,TIMESTAMP\nu,i1,$(($(date +%s) + 90000))\n"
refuses 1 'bad.csv:2: column TIMESTAMP: .* over a day in the future' "${train[@]}"
refuses 1 'over a day in the future' "$personalize" evaluate -m model.pzm -i bad.csv
refuses 1 'over a day in the future' "$personalize" convert --from model.pzm -o x.pzm --check bad.csv
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,i,880000000000\n'
refuses 1 'looks like milliseconds' "${train[@]}" --skip-bad-rows
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,i,1\nu,\0,2\n'
refuses 1 'bad.csv:3: a NUL byte' "${train[@]}"
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,\xff\xfe,2\n'
refuses 1 'bad.csv:2: column ITEM_ID: not valid UTF-8' "${train[@]}"
csv 'USER_ID,ITEM_ID,TIMESTAMP\nu,i,1\nu,j,2\n'
refuses 1 'only one user' "${train[@]}"
{ printf 'USER_ID,ITEM_ID,TIMESTAMP\nu,'; head -c 10000000 /dev/zero | tr '\0' x; printf ',1\n'; } >bad.csv
refuses 1 'bad.csv:2: the row is longer than 1 MiB' "${train[@]}"
head -c 100 model.pzm >short.pzm
refuses 1 'short.pzm: ' "$personalize" inspect short.pzm
cp data/interactions.csv not-a-model.pzm
refuses 1 'not a model file' "$personalize" evaluate -m not-a-model.pzm -i data/interactions.csv
refuses 2 '^personalize recommend: --count: 0 is outside \[1, 10000\]' "$personalize" recommend -m model.pzm -i data/interactions.csv -u u1 -n 0
echo "ok"
