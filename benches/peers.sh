#!/usr/bin/env bash
# All-reduce, f32 sum in place: annulus, plain C loops, Open MPI and Gloo by turns on this machine, beside its memory floor.
#
#     benches/peers.sh                                   2 and 4 ranks, 4 KiB to 256 MiB, 5 rounds: about half an hour
#     ROUNDS=1 SIZES="65536 1048576" benches/peers.sh    a look
#     MEMORY=private PEERS="sketch mpi" benches/peers.sh buffers that peers cannot reach, as those of Open MPI always are
#
# Settings, from the environment: ROUNDS, RANKS, SIZES (bytes), SECONDS_EACH (timed calls of one size), PEERS ("sketch mpi gloo"),
# MEMORY (registered or private).
#
# What is compared: every program checks its sums, warms up, meets at a barrier before each timed call, takes the slowest
# rank's time, and gives the median. The programs take turns size by size, in another order each round, and before and
# after each turn `probe` measures how fast a cache line crosses between two cores and how fast memory is: on virtual
# machines both change within seconds, so only figures of one turn are compared. The table's ratios are medians, over the
# rounds, of the ratio within a turn.
#
# The sketch is C without any checks: over shared memory ring, direct, and direct chunk by chunk; over private memory staged, in
# chunks of three sizes. The best of the three counts.
# Open MPI runs with the strongest settings we found for one machine: shared memory with bounce buffers for every size
# (UCX posix and CMA, no rendezvous), and a malloc that keeps its pages, because MPI_Allreduce allocates scratch in every
# call and would fault it in each time. Gloo has TCP on loopback only.
#
# Figures go to target/peers/figures.tsv as they come; the table goes to standard output.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${ROUNDS:-5}
worlds=${RANKS:-2 4}
sizes=${SIZES:-4096 16384 65536 262144 1048576 4194304 16777216 67108864 268435456}
seconds=${SECONDS_EACH:-0.4}
peers=${PEERS:-sketch mpi gloo}
memory=${MEMORY:-registered}
out=target/peers
figures=$out/figures.tsv

say() { printf '%s\n' "$*" >&2; }

# ---- build, and tell what is missing ------------------------------------------------------------------------------------

mkdir -p "$out"
cargo build --release --quiet --features cli
if ! command -v cc >/dev/null; then
    say "cc is missing: apt-get install build-essential"
    exit 1
fi
cc -O3 -march=native -Wall benches/peers/probe.c -o "$out/probe"

build_sketch() {
    cc -O3 -march=native -Wall benches/peers/all_reduce_sketch.c -o "$out/all_reduce_sketch"
}

build_mpi() {
    if ! command -v mpicc.openmpi >/dev/null || ! command -v mpirun.openmpi >/dev/null; then
        say "SKIPPED Open MPI, which is not installed: apt-get install libopenmpi-dev openmpi-bin"
        return 1
    fi
    mpicc.openmpi -O3 benches/peers/all_reduce_mpi.c -o "$out/all_reduce_mpi" -lm
    if ! run_mpi 2 4096 >/dev/null; then
        say "SKIPPED Open MPI, which does not run as above"
        return 1
    fi
}

build_gloo() {
    if [ ! -e /usr/include/gloo/allreduce.h ] || ! command -v g++ >/dev/null; then
        say "SKIPPED Gloo, which is not installed: apt-get install g++ libgloo-dev"
        return 1
    fi
    g++ -O3 -std=c++17 benches/peers/all_reduce_gloo.cc -o "$out/all_reduce_gloo" -lgloo -pthread
}

# ---- one turn of each program: RANKS BYTES -> microseconds --------------------------------------------------------------

run_annulus() {
    target/release/annulus bench --ranks "$1" -b "$2" -e "$2" --place in --seconds "$seconds" --memory "$memory" |
        awk '!/^#/ { if ($13 != 0) { print $13 " wrong" > "/dev/stderr"; exit 1 } print $10 }'
}

run_sketch() {
    local private=()
    [ "$memory" = registered ] || private=(private)
    "$out/all_reduce_sketch" "$1" "$seconds" "$2" "${private[@]}" |
        awk '{
            if ($5 != 0) { print $5 " wrong" > "/dev/stderr"; exit 1 }
            best = $2
            for (way = 3; way <= 4; way++) if ($way < best) best = $way
            print best
        }'
}

run_mpi() {
    local root=()
    [ "$(id -u)" != 0 ] || root=(--allow-run-as-root)
    MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
        mpirun.openmpi "${root[@]}" --oversubscribe -np "$1" \
        -x MALLOC_MMAP_THRESHOLD_ -x MALLOC_TRIM_THRESHOLD_ -x MALLOC_TOP_PAD_ \
        --mca pml ucx --mca pml_ucx_tls any --mca pml_ucx_devices any -x UCX_TLS=self,posix,cma -x UCX_RNDV_THRESH=inf \
        "$out/all_reduce_mpi" "$seconds" "$2" </dev/null |
        awk '{ if ($4 != 0) { print $4 " wrong" > "/dev/stderr"; exit 1 } print $2 }'
}

run_gloo() {
    local meeting
    meeting=$(mktemp -d)
    "$out/all_reduce_gloo" "$meeting" "$1" "$seconds" "$2" |
        awk '{ if ($4 != 0) { print $4 " wrong" > "/dev/stderr"; exit 1 } print $2 }'
    rm -r "$meeting"
}

# Line time, and of the two floors the lower one.
run_probe() {
    "$out/probe" "$1" "$2" | awk '/^line/ { line = $2 } /^floor/ { print line, ($3 < $4 ? $3 : $4) }'
}

# ---- rounds -------------------------------------------------------------------------------------------------------------

programs=(annulus)
for peer in $peers; do
    if "build_$peer"; then programs+=("$peer"); fi
done

: >"$figures"
for ((round = 1; round <= rounds; round++)); do
    for ranks in $worlds; do
        for size in $sizes; do
            say "round $round of $rounds: $ranks ranks, $size bytes"
            note() { printf '%s\t%s\t%s\t%s\t%s\n' "$round" "$ranks" "$size" "$1" "$2" >>"$figures"; }
            read -r line floor < <(run_probe "$ranks" "$size")
            note line "$line"
            note floor "$floor"
            for ((turn = 0; turn < ${#programs[@]}; turn++)); do
                program=${programs[(turn + round) % ${#programs[@]}]}
                note "$program" "$("run_$program" "$ranks" "$size")"
            done
            read -r line floor < <(run_probe "$ranks" "$size")
            note line "$line"
            note floor "$floor"
        done
    done
done

# ---- the table ----------------------------------------------------------------------------------------------------------

awk -F '\t' '
    function median(list, values, count, i, j, value) {
        count = split(list, values, " ")
        if (count == 0) return ""
        for (i = 2; i <= count; i++) {
            value = values[i] + 0
            for (j = i - 1; j >= 1 && values[j] + 0 > value; j--) values[j + 1] = values[j]
            values[j + 1] = value
        }
        return count % 2 ? values[(count + 1) / 2] : (values[count / 2] + values[count / 2 + 1]) / 2
    }
    function us(value) { return value == "" ? "-" : sprintf(value < 100 ? "%.2f" : "%.0f", value) }
    # Median over the rounds of numerator / denominator.
    function ratio(case_, numerator, denominator, list, round, above, below) {
        list = ""
        for (round = 1; round <= rounds; round++) {
            above = median(turn[case_, round, numerator])
            below = median(turn[case_, round, denominator])
            if (above != "" && below > 0) list = list " " (above / below)
        }
        list = median(list)
        return list == "" ? "-" : sprintf("%.2f", list)
    }
    {
        if ($1 > rounds) rounds = $1
        name = $2 SUBSEP $3
        if (!(name in seen)) { seen[name] = 1; order[++cases] = name }
        turn[name, $1, $4] = turn[name, $1, $4] " " $5
        all[name, $4] = all[name, $4] " " $5
    }
    END {
        print "| ranks | bytes | annulus us | sketch us | sketch / annulus | Open MPI us | Open MPI / annulus | Gloo us | Gloo / annulus | floor us | annulus / floor | line ns |"
        print "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        for (i = 1; i <= cases; i++) {
            name = order[i]
            split(name, parts, SUBSEP)
            count = split(all[name, "line"], lines, " ")
            least = most = lines[1] + 0
            for (j = 2; j <= count; j++) {
                if (lines[j] + 0 < least) least = lines[j] + 0
                if (lines[j] + 0 > most) most = lines[j] + 0
            }
            printf "| %d | %d | %s | %s | %s | %s | %s | %s | %s | %s | %s | %.0f (%.0f to %.0f) |\n", parts[1], parts[2],
                us(median(all[name, "annulus"])), us(median(all[name, "sketch"])), ratio(name, "sketch", "annulus"),
                us(median(all[name, "mpi"])), ratio(name, "mpi", "annulus"),
                us(median(all[name, "gloo"])), ratio(name, "gloo", "annulus"), us(median(all[name, "floor"])),
                ratio(name, "annulus", "floor"), median(all[name, "line"]), least, most
        }
    }
' "$figures"
